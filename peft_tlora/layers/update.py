"""The masked update of a linear layer, as it is computed: in two products, or as one weight."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import Factors, Update

# entries of a weight, 128 KB in float32
_SMALL = 2**15


class Prefixes(NamedTuple):
    """A mask that differs between samples, as numbers.

    Args:
        ranks: How many ranks each sample has.
        scaling: LoRA's scaling.
    """

    ranks: tuple[int, ...]
    scaling: float


class Mask(NamedTuple):
    """Mask times scaling of an adapter's update in one forward.

    Args:
        scale: What all rows have in common: a number, or a tensor of shape () or (r, 1).
        gate: What each row has of its own: broadcasts to (..., ranks), the two columns of a rank
            alike. None if nothing.
        ranks: How many ranks are computed and gated, None for all.
        rows: The gate of a linear layer with all leading dimensions of its input, (rows, ranks).
        half: Its first half, of one column a rank, (rows, r).
        prefixes: The gate as numbers, where the host knows it.
    """

    scale: float | Tensor = 1.0
    gate: Tensor | None = None
    ranks: int | None = None
    rows: Tensor | None = None
    half: Tensor | None = None
    prefixes: Prefixes | None = None


class Folded(NamedTuple):
    """An update as one weight, and what its gradients are made with.

    Args:
        with_base: Whether the base layer's weight is in it.
        weight: Shape (out, in), or (batch, out, in) if each sample has a gate.
        down: What gives the input of the trained up-projection, (r, in).
        up: Both halves of the up-projection as one, (out, r).
        scale: As in `Update`.
        q: As in `Update`.
    """

    with_base: bool
    weight: Tensor
    down: Tensor
    up: Tensor
    scale: float | Tensor
    q: Tensor | None


class Masked(NamedTuple):
    """What a layer's update is computed from.

    Args:
        factors: Factors of matrices.
        mask: Their mask.
        dtype: The dtype of the computation.
        update: The factors fused and masked but for the gate, if that was done ahead.
        folded: The update as one weight, if that was done ahead.
        again: What returns the `update` that was made ahead once more, for the backward of a layer
            that doesn't keep it.
    """

    factors: Factors
    mask: Mask
    dtype: torch.dtype
    update: Update | None = None
    folded: Folded | None = None
    again: Callable[[], Update] | None = None

    def made(self, *, trained: bool) -> Update:
        """The factors fused and masked but for the gate."""
        if self.update is not None:
            return self.update
        factors = self.factors.leading(self.mask.ranks).to(self.dtype)
        return factors.update(self.mask.scale, trained=trained)

    def folds(self, shape: torch.Size, weight: Tensor | None) -> bool:
        """Whether it is cheaper to multiply an input of a shape by one weight than by two factors.

        With factors, an update costs rows x (in + out) x ranks operations; as a weight that is
        added to the base layer's it costs in x out x ranks for each mask. Where that would lose
        the update, in 16 bits, its own weight is one more operand, which pays in small layers only.
        """
        gate = self.mask.gate
        if not is_small(self.factors) and (weight is None or not self.takes(weight)):
            return False
        rows = shape[:-1].numel()
        if gate is not None:
            if len(shape) != 3 or gate.shape[:-1] != (shape[0], 1):
                return False
            rows = shape[1]
        out_features, in_features = self.factors.dp.shape[0], shape[-1]
        return rows * (out_features + in_features) >= out_features * in_features

    def takes(self, weight: Tensor) -> bool:
        """Whether a weight can be added to, as no bits are lost."""
        return weight.dtype == self.dtype and weight.dtype in (torch.float32, torch.float64)

    def fold(self, update: Update, weight: Tensor | None) -> Folded:
        """The update as one weight: in front of all, those of several layers may be stacked.

        Args:
            update: What `made` returns.
            weight: The base layer's weight of shape (out, in), if there is one.
        """
        with_base = weight is not None and self.takes(weight)
        base = weight if with_base else None
        delta = delta_weight(update, self.mask, base, passing=not is_small(self.factors))
        return Folded(with_base, delta, *halves(update), update.scale, update.q)


def is_small(factors: Factors) -> bool:
    """Whether a layer's memory matters less than the number of its operators."""
    return factors.dp.shape[0] * factors.dq.shape[1] <= _SMALL


def delta_weight(
    update: Update, mask: Mask, weight: Tensor | None, *, passing: bool = False
) -> Tensor:
    """The weight of an update, added to another one if there is one.

    Args:
        update: The update.
        mask: Its mask.
        weight: The other weight, of shape (..., out, in).
        passing: Whether nobody needs the result when the next one of this thread is made.

    Returns:
        Shape (..., out, in), or (..., batch, out, in) if each sample has a gate.
    """
    down, up, gate = update.down, update.up, mask.gate
    if mask.prefixes is not None and weight is not None and weight.dim() == 2:
        return _nested(weight, update, mask, passing=passing)
    if gate is None:
        if weight is None:
            return torch.matmul(up, down)
        if weight.dim() == 3:
            return torch.baddbmm(weight, up, down)
        out = _space(weight.shape, weight) if passing else None
        return torch.addmm(weight, up, down, out=out)
    up = up.unsqueeze(-3) * gate
    product = torch.matmul(up.flatten(-3, -2), down).view(*up.shape[:-1], down.shape[-1])
    return product if weight is None else product.add_(weight.unsqueeze(-3))


def _nested(weight: Tensor, update: Update, mask: Mask, *, passing: bool) -> Tensor:
    """A weight with the update for each sample: that of one with fewer ranks, and what is more.

    All together they cost what the sample with the most ranks does.
    """
    ranks, scaling = mask.prefixes  # pyright: ignore[reportGeneralTypeIssues]
    columns, block = update.down.shape[0], mask.half.shape[1]  # pyright: ignore[reportOptionalMemberAccess]
    shape = torch.Size((len(ranks), *weight.shape))
    weights = _space(shape, weight) if passing else weight.new_empty(shape)
    done, before = 0, weight
    for sample in sorted(range(len(ranks)), key=ranks.__getitem__):
        rank, own = ranks[sample], weights[sample]
        if rank == done:
            own.copy_(before)
        for start in range(0, columns if rank > done else 0, block):
            part = slice(start + done, start + rank)
            torch.addmm(before, update.up[:, part], update.down[part], alpha=scaling, out=own)
            before = own
        done, before = rank, own
    return weights


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.of_dtype: dict[torch.dtype, Tensor] = {}


_buffers = _Buffers()


def _space(shape: torch.Size, like: Tensor) -> Tensor:
    """Memory for a passing result, the same each time.

    The allocator of a CPU gives large pieces back to the system, which takes longer to provide
    them anew than the multiplication takes.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size, buffer = shape.numel(), _buffers.of_dtype.get(like.dtype)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = _buffers.of_dtype[like.dtype] = torch.empty(size, dtype=like.dtype)
    return buffer[:size].view(shape)


def halves(update: Update) -> tuple[Tensor, Tensor]:
    """What gives the input of the trained up-projection, and the sum of both up-projections."""
    down, up, _, q = update
    if q is None:
        return down, up
    r = q.shape[-3]
    return down[..., :r, :], up[..., :r] + up[..., r:]
