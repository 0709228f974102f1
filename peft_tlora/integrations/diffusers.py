"""Lets diffusers' loaders recognise a file of T-LoRA; the sole contact with their private parts.

`load_lora_weights` and `load_lora_adapter` make the adapter's config in one private function, which
always builds a `LoraConfig`. It is wrapped: weights that hold a T-LoRA schedule get a
`TLoraConfig`, everything else goes to the original. `load_tlora_weights` does without it.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from itertools import count
from os import PathLike
from typing import Any

import diffusers
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft import inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from ..checkpoint import SCHEDULE, config_from_state_dict, is_tlora
from ..config import TLoraConfig
from ..formats.adapter import Adapter, check_fit
from ..formats.tensors import layers_of_own

_FUNCTION = "_create_lora_config"
_HOME = "diffusers.utils.peft_utils"
# they import the function by its name, so each holds a reference of its own
_USERS = ("diffusers.loaders.peft", "diffusers.loaders.lora_base")
_WEIGHTS = "_weights_of_file"  # of a config, until its adapter is injected
_ARGUMENTS = ["state_dict", "network_alphas", "metadata", "rank_pattern_dict"]


def install() -> None:
    """Wrap the loaders, once; warn of an unknown diffusers and leave it alone."""
    from diffusers.utils import peft_utils

    original = getattr(peft_utils, _FUNCTION, None)
    if hasattr(original, "__wrapped__"):
        return
    if original is None or list(inspect.signature(original).parameters)[:4] != _ARGUMENTS:
        warnings.warn(
            f"peft_tlora doesn't know the LoRA loader of diffusers {diffusers.__version__}, so "
            "pipe.load_lora_weights won't recognise T-LoRA files; load them with "
            "peft_tlora.load_tlora_weights(pipe, source).",
            stacklevel=2,
        )
        return
    _replace(_wrap(original))


def uninstall() -> None:
    """Put the original function back."""
    from diffusers.utils import peft_utils

    _replace(inspect.unwrap(getattr(peft_utils, _FUNCTION)))


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_config(
        state_dict: Mapping[str, Tensor],
        network_alphas: Any,
        metadata: dict[str, Any] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _refuse_hotswap(state_dict, kwargs.get("model_state_dict"), kwargs.get("adapter_name"))
        if not is_tlora(state_dict):
            return original(state_dict, network_alphas, metadata, *args, **kwargs)
        model = kwargs.get("model_state_dict")
        if model is not None:
            _refuse_other_base(state_dict, model)
        config = config_from_state_dict(state_dict) if not metadata else TLoraConfig(**metadata)
        if model is None:  # a text encoder: the tuner will see it
            vars(config)[_WEIGHTS] = state_dict
        return config

    return create_config


def refuse_other_base(config: Any, model: nn.Module) -> None:
    """Refuse the config of a file of another text encoder, before layers are put into this one.

    Raises:
        ValueError: If the file has other layers, or for other shapes.
    """
    weights = vars(config).pop(_WEIGHTS, None)
    if weights is not None:
        _refuse_other_base(weights, model.state_dict())


def _refuse_other_base(new: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """Refuse an adapter for other layers; torch would notice when they are already in the model."""
    names = {key.rpartition(".")[0] for key in model}
    for layer in (key.removesuffix(SCHEDULE) for key in new if key.endswith(SCHEDULE)):
        place = next((name for name in (f"{layer}.base_layer", layer) if name in names), None)
        if place is None:
            raise ValueError(
                f"The adapter doesn't fit: the model has no layer {layer[:200]}. Is it for another "
                "base model?"
            )
        if f"{place}.weight" in model:
            q, p = (new[f"{layer}.lora_{x}.weight"] for x in "AB")
            check_fit(layer, q, p, model[f"{place}.weight"])


def _refuse_hotswap(
    new: Mapping[str, Tensor], model: Mapping[str, Tensor] | None, adapter_name: str | None
) -> None:
    """Refuse to exchange an adapter in place if the old or the new one is T-LoRA.

    diffusers would notice too late, and then delete the old adapter. It passes the name of an
    adapter that the model has only in this case.
    """
    ending = f".{adapter_name}"
    old = [key for key in model or () if f".lora_A{ending}." in key]
    if old and (is_tlora(new) or any(f".lora_schedule{ending}." in key for key in model or ())):
        raise ValueError(
            f"Hotswapping {adapter_name!r} is not supported with T-LoRA, whose adapters hold more "
            "than LoRA's matrices. Load the file under another name and activate it with "
            "set_adapters; delete_adapters frees the memory of the old one."
        )


def refuse_hotswap_preparation(model: nn.Module) -> None:
    """Refuse to add T-LoRA to a model after `enable_lora_hotswap`, which pads LoRA's matrices.

    Raises:
        ValueError: If the model is to be prepared for hotswapping by its next adapter.
    """
    if getattr(model, "_prepare_lora_hotswap_kwargs", None) is not None:
        raise ValueError(
            "enable_lora_hotswap is not supported with T-LoRA: its factors can't be padded to a "
            "common rank. Load the adapters under different names and choose with set_adapters."
        )


def load_tlora_weights(
    pipeline: Any,
    source: str | PathLike[str] | Mapping[str, Tensor],
    adapter_name: str | None = None,
    **kwargs: Any,
) -> None:
    """Load a T-LoRA file into a pipeline through public functions of diffusers and PEFT alone.

    After `import peft_tlora` the pipeline's own `load_lora_weights` does the same; this function
    is for a version of diffusers in which it can't.

    Args:
        pipeline: A pipeline with `load_lora_weights`.
        source: A folder, a file, a hub id or a state dict.
        adapter_name: Name of the adapter, "default_0" and so on if None.
        **kwargs: For the pipeline's `lora_state_dict`, such as `weight_name`.

    Raises:
        ValueError: If the source holds no T-LoRA adapter, or none for the pipeline's models or none
            that fits them, or the name is in use. Nothing has been changed then.
    """
    weights = source if isinstance(source, Mapping) else str(source)
    found = pipeline.lora_state_dict(weights, **kwargs)
    state_dict = found[0] if isinstance(found, tuple) else found
    parts = {
        name: _to_peft(
            {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in state_dict.items()
                if key.startswith(f"{name}.")
            }
        )
        for name, module in pipeline.components.items()
        if isinstance(module, nn.Module)
    }
    parts = {name: part for name, part in parts.items() if is_tlora(part)}
    if not parts:
        raise ValueError(
            f"{len(state_dict)} tensors were read, but none belongs to a T-LoRA adapter for a model"
            f" of {type(pipeline).__name__}; load plain LoRA with the pipeline's load_lora_weights."
        )
    taken = {
        name for part in parts for name in getattr(pipeline.components[part], "peft_config", {})
    }
    if adapter_name is None:
        adapter_name = next(name for i in count() if (name := f"default_{i}") not in taken)
    if adapter_name in taken:
        raise ValueError(f"The adapter name {adapter_name!r} is in use; choose another.")
    for name, part in parts.items():
        adapter = Adapter(name, layers_of_own(part, "T-LoRA"))
        adapter.check_fits(pipeline.components[name])
    configs = {name: config_from_state_dict(part) for name, part in parts.items()}
    prefixes = tuple(f"{name}." for name in parts)
    others = [key for key in state_dict if not key.startswith(prefixes)]
    if others:
        warnings.warn(
            f"{len(others)} tensors are of no T-LoRA adapter for a model of "
            f"{type(pipeline).__name__} and aren't loaded, such as {others[0][:200]!r}.",
            stacklevel=2,
        )
    for name, part in parts.items():
        module = pipeline.components[name]
        inject_adapter_in_model(configs[name], module, adapter_name=adapter_name)
        set_peft_model_state_dict(module, part, adapter_name)
        module._hf_peft_config_loaded = True  # what set_adapters and others of diffusers ask for


def _to_peft(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if any(".lora_linear_layer." in name for name in weights):
        return convert_state_dict_to_peft(weights)
    return convert_unet_state_dict_to_peft(weights)  # leaves PEFT's own names alone


def _replace(function: Callable[..., Any]) -> None:
    for name in (_HOME, *_USERS):
        if name in sys.modules:  # the others will import it from its home
            setattr(sys.modules[name], _FUNCTION, function)
