"""diffusers' private parts: its LoRA loaders, its hooks, and how a model's tokens are split."""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import nn

_CREATE, _FETCH = "_create_lora_config", "_fetch_state_dict"
# function -> the module that it is from, and those that import it by its name
_PLACES = {
    _CREATE: ("utils.peft_utils", "loaders.peft", "loaders.lora_base"),
    _FETCH: ("loaders.lora_base", "loaders.lora_pipeline", "loaders.peft"),
}
_MOVING = ("group_offloading", "layerwise_casting")  # hooks that exchange weights
_ARGUMENTS = ["state_dict", "network_alphas", "metadata", "rank_pattern_dict"]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def wrap(*, create: Wrap, fetch: Wrap, set_device: Wrap) -> bool:
    """Wrap the loaders, once.

    Args:
        create: Wraps the function that makes an adapter's config of a file's tensors.
        fetch: Wraps the one that reads a file: it returns tensors, the adapter's metadata and, if
            `return_file_metadata` is given, all of the file's.
        set_device: Wraps `set_lora_device` of pipelines.

    Returns:
        False if this diffusers has other loaders, which are left alone then.
    """
    originals = [getattr(_module(_PLACES[name][0]), name, None) for name in (_CREATE, _FETCH)]
    if None in originals or list(inspect.signature(originals[0]).parameters)[:4] != _ARGUMENTS:  # pyright: ignore[reportArgumentType]
        return False
    if not hasattr(originals[0], "__wrapped__"):
        _replace(_CREATE, create(originals[0]))  # pyright: ignore[reportArgumentType]
        _replace(_FETCH, fetch(originals[1]))  # pyright: ignore[reportArgumentType]
        LoraBaseMixin.set_lora_device = set_device(LoraBaseMixin.set_lora_device)
    return True


def unwrap() -> None:
    """Put the original functions back."""
    for name, places in _PLACES.items():
        _replace(name, inspect.unwrap(getattr(_module(places[0]), name)))
    LoraBaseMixin.set_lora_device = inspect.unwrap(LoraBaseMixin.set_lora_device)


def is_prepared_for_hotswap(model: nn.Module) -> bool:
    """Whether a model is to be prepared for hotswapping by its next adapter."""
    return getattr(model, "_prepare_lora_hotswap_kwargs", None) is not None


def moves_weights(model: nn.Module) -> bool:
    """Whether diffusers' hooks put other weights into parts of a model for each forward."""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return any(name in _MOVING for registry in registries if registry for name in registry.hooks)


def token_shard(denoiser: nn.Module) -> tuple[int, int] | None:
    """Which part of the tokens this process has of how many; None if it has all.

    With a `ContextParallelConfig` diffusers splits them below the hooks of the denoiser.
    """
    parallel: Any = getattr(denoiser, "_parallel_config", None)
    context = getattr(parallel, "context_parallel_config", None)
    if context is None:
        return None
    mesh = context._flattened_mesh
    return torch.distributed.get_rank(mesh.get_group()), mesh.size()


def _module(name: str) -> ModuleType:
    return import_module(f"diffusers.{name}")


def _replace(name: str, function: Callable[..., Any]) -> None:
    for place in _PLACES[name]:
        if f"diffusers.{place}" in sys.modules:  # the others will import it from its home
            setattr(_module(place), name, function)
