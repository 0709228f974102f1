"""Run an unedited LoRA script with T-LoRA: its adapters are exchanged where PEFT makes them."""

import dataclasses
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from ..config import TLoraConfig
from ..hosts import saving
from ..integrations.peft import lora_tuner
from ..model import TLoraModel
from ..timestep.denoisers import find_denoiser
from ..timestep.functions import timestep_from as decorated
from ..timestep.state import TimestepLayer, TimestepState, states_of


class NotTrainedError(RuntimeError):
    """The script ended, but nothing was trained with T-LoRA's mask."""


class _Exchanged(NamedTuple):
    """An adapter that became T-LoRA, and the states of its layers, if these follow the time."""

    adapter: str
    model: str
    states: list[TimestepState]


def run_script(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    text_encoders: bool = False,
    timestep_from: Mapping[str, str] | None = None,
    **options: Any,
) -> int:
    """Run a Python script as `__main__` with T-LoRA in the place of LoRA.

    Each new LoRA adapter of a denoiser becomes a T-LoRA adapter, and a line says so. Adapters that
    the script loads from a file stay what they are.

    Args:
        script: Path of the script.
        arguments: Its arguments, untouched.
        text_encoders: Whether adapters of models without a timestep become T-LoRA, too.
        timestep_from: Functions that get the timestep where no denoiser's forward does, as
            "module:function", each with the argument; see `peft_tlora.timestep_from`. It counts as
            `options` say.
        **options: Fields of `TLoraConfig` beyond those of `LoraConfig`.

    Returns:
        The number of adapters exchanged.

    Raises:
        NotTrainedError: If the script never made an adapter that could be exchanged, or the layers
            of one never had a timestep.
    """
    for function, argument in (timestep_from or {}).items():
        decorated(argument, function=function)
    made: list[_Exchanged] = []
    with _exchanged(made, text_encoders, options), _as_main(script, arguments), _reported_files():
        runpy.run_path(str(script), run_name="__main__")
    if not made:
        raise NotTrainedError(
            f"{script} made no LoRA adapter for a denoiser, so nothing was trained with T-LoRA. "
            "The script must build a peft.LoraConfig and add it to a model that takes a timestep."
        )
    _say("loading the adapter needs `import peft_tlora` before")
    for adapter, model, states in made:
        if states and not any(state.was_set for state in states):
            raise NotTrainedError(
                f"Adapter {adapter!r} of {model} never had a timestep, so whatever was trained had "
                "all ranks: the script runs the model's blocks without its forward, or passes the "
                "time in its own way. Say where with --timestep-from module:function:argument, "
                "docs/hosts.md has examples."
            )
    return len(made)


@contextmanager
def _reported_files() -> Iterator[None]:
    """Say which files with a T-LoRA adapter are written, and whether they are whole."""

    def report(path: str, whole: bool) -> None:
        kind = "the whole adapter" if whole else "the trained tensors alone, see the warning"
        _say(f"{path} holds {kind}")

    saving.listeners.append(report)
    try:
        yield
    finally:
        saving.listeners.remove(report)


@contextmanager
def _exchanged(
    made: list[_Exchanged], text_encoders: bool, options: dict[str, Any]
) -> Iterator[None]:
    """Let PEFT make T-LoRA's tuner where LoRA's is asked for a new adapter."""

    class Exchange(LoraModel):
        def __new__(
            cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
        ):
            one = config[adapter_name] if isinstance(config, dict) else config
            loading = kwargs.get("state_dict") is not None or kwargs.get("low_cpu_mem_usage")
            if loading or type(one) is not LoraConfig or not (text_encoders or _is_denoiser(model)):
                return LoraModel(model, config, adapter_name, *args, **kwargs)
            new = tlora_config(one, **options)
            tuner = TLoraModel(model, {adapter_name: new}, adapter_name, *args, **kwargs)
            states = [] if new.rank_schedule == "constant" else states_of(model)
            states = [state for state in states if state.denoiser_name is not None]
            made.append(_Exchanged(adapter_name, type(model).__name__, states))
            _report(model, adapter_name, new)
            return tuner

    with lora_tuner(Exchange):
        yield


def tlora_config(config: LoraConfig, **options: Any) -> TLoraConfig:
    """The T-LoRA configuration with the fields of a LoRA configuration.

    Raises:
        ValueError: If it uses an option of LoRA that T-LoRA doesn't support.
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    fields.pop("peft_type")
    return TLoraConfig(**fields, **options)


def _is_denoiser(model: nn.Module) -> bool:
    return any(find_denoiser(model, name) is not None for name, _ in model.named_modules() if name)


def _report(model: nn.Module, adapter_name: str, config: TLoraConfig) -> None:
    layers = sum(1 for module in model.modules() if isinstance(module, TimestepLayer))
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    other = "" if scale == 1 else ", not the authors' 1"
    _say(
        f"adapter '{adapter_name}' of {type(model).__name__} is T-LoRA in {layers} "
        f"layers (r={config.r}, lora_alpha={config.lora_alpha}, scale {scale:g}{other}, "
        f"min_rank={config.min_rank}, {config.rank_schedule} schedule, "
        f"ortho_init={config.ortho_init})"
    )


def _say(message: str) -> None:
    print(f"peft_tlora: {message}", file=sys.stderr, flush=True)


@contextmanager
def _as_main(script: str | Path, arguments: Sequence[str]) -> Iterator[None]:
    """The interpreter's state as `python script arguments` would have it."""
    argv, path = sys.argv[:], sys.path[:]
    sys.argv[:] = [str(script), *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        yield
    finally:
        sys.argv[:], sys.path[:] = argv, path
