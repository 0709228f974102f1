"""Says what a host has written that saves a T-LoRA adapter in its own way."""

import functools
import json
import shlex
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..config import TLoraConfig
from ..integrations.imports import wrap_function
from ..schedule import SCHEDULE_FIELDS

_TRAINING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", *SCHEDULE_FIELDS)
_TRAINING += ("ortho_init", "ortho_source", "init_seed")
_configs: set[str] = set()  # of the adapters of this process, as JSON
# what else is to hear of a file: its name and whether it is whole
listeners: list[Callable[[str, bool], None]] = []

_HALF = (
    "{path} holds the trained tensors of a T-LoRA adapter without its schedule, as a host saves "
    "them that keeps what requires grad. Its own resume into an adapter of the same config is "
    "right; peft_tlora.load_tlora_weights(model, file, config=...) loads it anywhere. For a whole "
    "file, or with `--to lora` plain LoRA at one mask:\n"
    "peft-tlora convert {quoted} NEW --to diffusers --config {config}"
)
_RENAMED = (
    "{path} holds the tensors of a T-LoRA adapter under another format's names, whose programs "
    "know plain LoRA only and would take the differences for it. Make such a file of the adapter "
    "as PEFT saves it, at one mask or in bands: peft-tlora convert ADAPTER NEW --to kohya"
)


def install() -> None:
    """Look at the names of the tensors that safetensors writes into a file."""
    wrap_function("safetensors.torch:save_file", _noted)


def remember(config: TLoraConfig, unit: Mapping[str, Any]) -> None:
    """Keep what a file with the trained tensors alone won't say.

    Args:
        config: The config of a new adapter.
        unit: Its fields of the timestep as the model has it.
    """
    default = TLoraConfig()
    fields = {name: getattr(config, name) for name in _TRAINING} | dict(unit)
    told = {k: v for k, v in fields.items() if v != getattr(default, k) or k in ("r", *unit)}
    _configs.add(json.dumps(told))


def _noted(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(tensors, filename, *args, **kwargs)
        names = tensors if isinstance(tensors, Mapping) else ()
        lambdas = [name for name in names if "lora_lambda" in name]
        if lambdas:
            ours = all(".lora_lambda" in name for name in lambdas)
            whole = ours and any(".lora_schedule." in name for name in names)
            if not whole:
                message = _HALF if ours else _RENAMED
                warnings.warn(_completed(message, str(filename)), stacklevel=2)
            for listener in listeners:
                listener(str(filename), whole)
        return result

    return save_file


def _completed(message: str, path: str) -> str:
    config = shlex.quote(next(iter(_configs))) if len(_configs) == 1 else "CONFIG.json"
    return message.format(path=path, quoted=shlex.quote(path), config=config)
