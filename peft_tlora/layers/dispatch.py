"""Which T-LoRA layer one of PEFT's LoRA layers becomes."""

from typing import Any

from peft.tuners.lora import layer as lora
from torch import nn

from .attention import MultiheadAttention
from .layer import FROZEN, TLoraLayer
from .quantized import quantized_class
from .unquantized import Conv1d, Conv2d, Conv3d, Linear

_LAYER_CLASSES: dict[type, type[TLoraLayer]] = {
    lora.Linear: Linear,
    lora.Conv1d: Conv1d,
    lora.Conv2d: Conv2d,
    lora.Conv3d: Conv3d,
    lora.MultiheadAttention: MultiheadAttention,
}


def become_tlora_layer(layer: Any, layer_name: str) -> None:
    """Make one of PEFT's LoRA layers the T-LoRA layer of its kind.

    Its class changes, so that its adapters, its hooks and every reference to it stay in force.

    Raises:
        TypeError: If T-LoRA doesn't support this kind of layer.
    """
    if isinstance(layer, TLoraLayer):
        return
    cls = _LAYER_CLASSES.get(type(layer)) or quantized_class(type(layer))
    if cls is None:
        raise TypeError(
            f"T-LoRA does not support {type(layer).__module__}.{type(layer).__name__} at "
            f"{layer_name}; leave it out with exclude_modules."
        )
    layer.__class__ = cls
    for name in ("lora_lambda", *FROZEN):
        setattr(layer, name, nn.ModuleDict())
    layer.recipes = {}
