"""The modules that hold a layer's factors beside LoRA's own, and what each of them computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_PLAIN_TENSORS = (nn.Parameter, Tensor)


class TensorModule(nn.Module):
    """One tensor of an adapter, as a module so that its name ends in `.weight` as LoRA's do.

    Args:
        weight: The tensor.
        trainable: Whether it becomes a parameter; a buffer if not.
        saved: Whether a buffer belongs to the state dict.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, trainable: bool = False, saved: bool = True) -> None:
        super().__init__()
        self.saved = saved
        if trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight, persistent=saved)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TensorModule":
        """Move and cast a buffer, but to no dtype of fewer than 16 bits, which would ruin it."""
        before = self.weight
        super()._apply(fn, recurse)
        if not before.requires_grad and self.weight.dtype.itemsize < 2:
            self.weight = before.to(self.weight.device)
        return self


class Projection(TensorModule):
    """A frozen projection: a buffer of shape (out, in) or (out, in, *kernel)."""

    def forward(self, x: Tensor, like: nn.Module | None = None) -> Tensor:
        """Project (..., in); or (batch, in, ...) as a convolution `like` does with its weight."""
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        if like is None:
            return linear(x, weight)
        convolution: Any = like
        return convolution._conv_forward(x, weight, None)


class Scale(TensorModule):
    """Singular values, or their differences: a tensor of shape (r, 1)."""

    def forward(self, x: Tensor, trailing: int = 0) -> Tensor:
        """Multiply (..., r), or (..., r, *trailing) with that number of trailing dimensions."""
        return x * self.weight.to(x.dtype).reshape(-1, *(1,) * trailing)


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: a forward of its own, or hooks."""
    own = module.__dict__
    return bool(
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own  # accelerate and diffusers wrap it
    )


def plain_weight(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> Tensor | None:
    """The weight of a module that may be read without calling it; None if somebody watches.

    Hooks, another class or a weight of another kind say that calling it does more: engines that
    shard or offload, quantisers, users' hooks.
    """
    if type(module) not in classes or is_watched(module):
        return None
    # as module.weight, but without a call in Python
    weight = module._parameters.get("weight")
    weight = module._buffers.get("weight") if weight is None else weight
    return weight if type(weight) in _PLAIN_TENSORS else None


def empty_scale(like: Tensor, r: int) -> Tensor:
    """Zeros for `Scale` on the device and with the dtype of another factor."""
    return torch.zeros(r, 1, device=like.device, dtype=like.dtype)
