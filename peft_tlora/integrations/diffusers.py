"""Lets diffusers' loaders recognise a file of T-LoRA; the sole contact with their private parts.

`load_lora_weights` and `load_lora_adapter` make the adapter's config in one private function, which
always builds a `LoraConfig`. It is wrapped: weights that hold a T-LoRA schedule get a
`TLoraConfig`, everything else goes to the original.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
from torch import Tensor

from ..checkpoint import config_from_state_dict, is_tlora
from ..config import TLoraConfig

_FUNCTION = "_create_lora_config"
_HOME = "diffusers.utils.peft_utils"
# they import the function by its name, so each holds a reference of its own
_USERS = ("diffusers.loaders.peft", "diffusers.loaders.lora_base")
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
            "load_lora_weights won't recognise T-LoRA files; load them with "
            "peft.PeftModel.from_pretrained.",
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
        if not is_tlora(state_dict):
            return original(state_dict, network_alphas, metadata, *args, **kwargs)
        return config_from_state_dict(state_dict) if not metadata else TLoraConfig(**metadata)

    return create_config


def _replace(function: Callable[..., Any]) -> None:
    for name in (_HOME, *_USERS):
        if name in sys.modules:  # the others will import it from its home
            setattr(sys.modules[name], _FUNCTION, function)
