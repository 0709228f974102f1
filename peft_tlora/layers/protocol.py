"""What an adapter may ask of its layer."""

from typing import Any, Protocol

from torch import nn

from ..timestep.state import TimestepState


class Layer(Protocol):
    """A T-LoRA layer as its adapters see it: PEFT's containers and ours, by the adapter's name.

    The containers' values are modules with a `weight`.
    """

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    base_layer: Any
    cast_input_dtype_enabled: bool
    lora_dropout: Any
    lora_A: Any
    lora_B: Any
    lora_lambda: Any
    lora_A_init: Any
    lora_B_init: Any
    lora_lambda_init: Any
    lora_variant: dict[str, Any]
    timestep_state: TimestepState | None

    def get_base_layer(self) -> nn.Module:
        """The adapted layer."""
        ...


def groups_of(layer: Layer) -> int:
    """Groups of the base layer: 1 unless it is a grouped convolution."""
    return getattr(layer.get_base_layer(), "groups", 1)
