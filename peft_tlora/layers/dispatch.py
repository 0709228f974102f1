"""Which T-LoRA layer takes the place of which of PEFT's LoRA layers."""

from peft.tuners.lora import layer as lora
from torch import nn

from .attention import MultiheadAttention
from .layer import FROZEN, Conv1d, Conv2d, Conv3d, Linear, TLoraLayer
from .quantized import quantized_class
from .ranks import Layer

_LAYER_CLASSES: dict[type, type[TLoraLayer]] = {
    lora.Linear: Linear,
    lora.Conv1d: Conv1d,
    lora.Conv2d: Conv2d,
    lora.Conv3d: Conv3d,
    lora.MultiheadAttention: MultiheadAttention,
}


def as_tlora_layer(layer: nn.Module, layer_name: str) -> Layer:
    """The T-LoRA layer that takes the place of one of PEFT's LoRA layers.

    It shares all of the layer's state, so that its adapters and hooks stay in force.

    Raises:
        TypeError: If T-LoRA doesn't support this kind of layer.
    """
    if isinstance(layer, TLoraLayer):
        return layer
    cls = _LAYER_CLASSES.get(type(layer)) or quantized_class(type(layer))
    if cls is None:
        raise TypeError(
            f"T-LoRA does not support {type(layer).__module__}.{type(layer).__name__} at "
            f"{layer_name}; leave it out with exclude_modules."
        )
    extended: Layer = cls.__new__(cls)
    object.__setattr__(extended, "__dict__", layer.__dict__)
    for name in ("lora_lambda", *FROZEN):
        setattr(extended, name, nn.ModuleDict())
    extended.recipes = {}
    return extended
