"""A layer and its one active T-LoRA adapter, where both may be read without a call."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import Factors, autocast_dtype
from .factors import plain_weight
from .update import Mask, Masked, delta_weight
from .variant import TLoraVariant

_BASES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Plain(NamedTuple):
    """A linear layer or convolution with one active adapter, all of whose tensors may be read.

    Args:
        layer: The layer.
        adapter: Name of the adapter.
        variant: What the adapter computes.
        factors: The adapter's factors, as matrices.
        weight: Weight of the base layer, frozen, as a matrix.
        bias: Bias of the base layer, frozen.
        trailing: Dimensions of the input behind its features, those of a convolution's kernel.
    """

    layer: Any
    adapter: str
    variant: TLoraVariant
    factors: Factors
    weight: Tensor
    bias: Tensor | None
    trailing: int

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
        if factors is None or factors.dq.dim() != weight.dim():  # an engine has them elsewhere
            return None
        trailing = weight.dim() - 2
        if trailing:
            weight, factors = weight.flatten(1), factors.flat()
        return cls(layer, names[0], variant, factors, weight, bias, trailing)

    def dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the update of an input is computed."""
        return self.variant.compute_dtype(self.layer, self.adapter, x)

    def mask(self, x: Tensor, dtype: torch.dtype) -> Mask:
        """The mask of the update of an input."""
        return self.variant.mask(self.layer, self.adapter, x, dtype, self.factors, self.trailing)

    def ready(self, x: Tensor) -> "Ready":
        """The update of an input, to be made by the layer itself."""
        dtype = self.dtype(x)
        masked = Masked(self.factors, self.mask(x, dtype), dtype)
        return Ready(self, x.shape, self.goes_at_once(x), masked)

    def goes_at_once(self, x: Tensor) -> bool:
        """Whether base layer and update are computed together: of one dtype, as the input is."""
        return x.dtype == self.weight.dtype and autocast_dtype(x) is None

    def rows(self, x: Tensor) -> torch.Size:
        """The shape of an input, of a convolution as the rows that its weight is multiplied by."""
        if not self.trailing:
            return x.shape
        return torch.Size((x.numel() // x.shape[-1 - self.trailing], self.weight.shape[1]))

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
        return self.trailing, *shapes, *kinds, scaling, cast, ranks.schedule, ranks.layout


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

    def folded_weight(self, x: Tensor) -> Tensor | None:
        """A convolution's weight with the update in it, None where that costs more than it saves.

        Without a derivative.
        """
        plain, _, at_once, masked = self
        if not at_once or masked.mask.gate is not None or not masked.takes(plain.weight):
            return None
        if not masked.folds(plain.rows(x), plain.weight):
            return None
        return delta_weight(masked.made(trained=False), masked.mask, plain.weight, passing=True)
