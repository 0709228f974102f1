"""A linear layer and its one active T-LoRA adapter, where both may be read without a call."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import Factors, autocast_dtype
from .factors import plain_weight
from .update import Mask, Masked
from .variant import TLoraVariant

_BASES = (nn.Linear,)


class Plain(NamedTuple):
    """A linear layer with one active adapter, all of whose tensors may be read.

    Args:
        layer: The layer.
        adapter: Name of the adapter.
        variant: What the adapter computes.
        factors: The adapter's factors.
        weight: Weight of the base layer, frozen.
        bias: Bias of the base layer, frozen.
    """

    layer: Any
    adapter: str
    variant: TLoraVariant
    factors: Factors
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: Any) -> "Plain | None":
        """What is to be read of a layer; None if something must be called."""
        modules = layer._modules  # without nn.Module's search for attributes
        base, adapters = modules["base_layer"], modules["lora_A"]._modules
        names = [name for name in layer.active_adapters if name in adapters]
        variant = layer.lora_variant.get(names[0]) if len(names) == 1 else None
        weight = plain_weight(base, _BASES)
        if weight is None or not isinstance(variant, TLoraVariant):
            return None
        bias, dropout = base._parameters["bias"], modules["lora_dropout"]._modules[names[0]]
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or not (type(dropout) is nn.Identity or not dropout.training):
            return None
        factors = variant.plain_factors(layer, names[0])
        return None if factors is None else cls(layer, names[0], variant, factors, weight, bias)

    def dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the update of an input is computed."""
        return self.variant.compute_dtype(self.layer, self.adapter, x)

    def mask(self, x: Tensor, dtype: torch.dtype) -> Mask:
        """The mask of the update of an input."""
        return self.variant.mask(self.layer, self.adapter, x, dtype, self.factors)

    def ready(self, x: Tensor) -> "Ready":
        """The update of an input, to be made by the layer itself."""
        dtype = self.dtype(x)
        return Ready(
            self, x.shape, self.goes_at_once(x), Masked(self.factors, self.mask(x, dtype), dtype)
        )

    def goes_at_once(self, x: Tensor) -> bool:
        """Whether base layer and update are computed together: of one dtype, as the input is."""
        return x.dtype == self.weight.dtype and autocast_dtype(x) is None

    def kind(self) -> Hashable:
        """What layers have in common that compute the same with different weights."""
        weight, (dq, dp, dlam, *_) = self.weight, self.factors
        shapes = weight.shape, dq.shape, dp.shape, dlam is None
        kinds = weight.dtype, dq.dtype, weight.device, dq.device
        ranks, layer = self.variant.ranks, self.layer
        scaling = layer.scaling[self.adapter]
        # in the place of a tensor, which is no constant, what it is
        scaling = id(scaling) if isinstance(scaling, Tensor) else scaling
        cast = layer.cast_input_dtype_enabled
        return *shapes, *kinds, scaling, cast, ranks.schedule, ranks.layout


class Ready(NamedTuple):
    """A layer, and the update of an input.

    Args:
        plain: The layer.
        shape: Shape of the input.
        at_once: Whether base layer and update are computed together.
        masked: The update.
    """

    plain: Plain
    shape: torch.Size
    at_once: bool
    masked: Masked
