"""The masked low-rank update as pure functions; forward, merge and export share them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The tensors of one adapter in one layer: what is trained, and the start that it is added to.

    The last four are None for Vanilla T-LoRA, whose `dq` and `dp` are LoRA's A and B.

    Args:
        dq: Trained difference of the down-projection, of shape (r, in, *kernel).
        dp: Trained difference of the up-projection, of shape (out, r / groups, *ones).
        dlam: Trained difference of the singular values, of shape (r, 1).
        q0: Frozen start of the down-projection, shaped like `dq`.
        p0: Frozen start of the up-projection, shaped like `dp`.
        lam0: Frozen start of the singular values, of shape (r, 1).
    """

    dq: Tensor
    dp: Tensor
    dlam: Tensor | None = None
    q0: Tensor | None = None
    p0: Tensor | None = None
    lam0: Tensor | None = None

    def leading(self, ranks: int | None) -> "Factors":
        """The factors of so many first ranks of an adapter without groups, None for all."""
        dq, dp, dlam, q0, p0, lam0 = self
        if ranks is None or ranks >= len(dq):
            return self
        if dlam is None or q0 is None or p0 is None or lam0 is None:
            return Factors(dq[:ranks], dp[:, :ranks])
        return Factors(
            dq.narrow(0, 0, ranks),
            dp.narrow(1, 0, ranks),
            dlam.narrow(0, 0, ranks),
            q0.narrow(0, 0, ranks),
            p0.narrow(1, 0, ranks),
            lam0.narrow(0, 0, ranks),
        )

    def to(self, dtype: torch.dtype) -> "Factors":
        """The factors in a dtype. As they are differences, rounding each loses what it loses LoRA.

        So an adapter under autocast computes what its file does that was rounded before.
        """
        if self.dq.dtype == dtype and (self.q0 is None or self.q0.dtype == dtype):
            return self
        return Factors(*(None if factor is None else factor.to(dtype) for factor in self))  # pyright: ignore[reportArgumentType]

    def update(self, scale: float | Tensor = 1.0, *, trained: bool = False) -> "Update":
        """`P diag(lam m s) Q - P0 diag(lam0 m s) Q0` as one product, of matrices.

        With `P = P0 + dP` and so on it equals `up down` with `up = [dP, P0]` and
        `down = m s [lam Q; dlam Q0 + lam dQ]`: no two large numbers are subtracted, and as long as
        the differences are zero, so is one factor of each summand, in every dtype.

        Args:
            scale: What all rows of the input have in common, mask times scaling: a number, or a
                tensor of shape () or (r, 1).
            trained: Whether a backward needs the rest of `Update`.

        Returns:
            The update, in the wider of the dtypes of trained and frozen factors. Factors of several
            layers, stacked in front, give updates stacked in front.
        """
        dq, dp, dlam, q0, p0, lam0 = self
        is_one = isinstance(scale, float) and scale == 1
        if dlam is None or q0 is None or p0 is None or lam0 is None:
            return Update(dq if is_one else dq * scale, dp, scale, None)
        lam, moved, q = lam0 + dlam, dlam, q0 + dq
        if not is_one:
            lam, moved = lam * scale, moved * scale
        down = torch.cat([lam * q, torch.addcmul(moved * q0, lam, dq)], dim=-2)
        if trained:
            q = (q if is_one else q * scale).unsqueeze(-1)
        return Update(down, torch.cat([dp, p0], dim=-1), lam, q if trained else None)

    def flat(self) -> "Factors":
        """The factors as matrices: those of a convolution have their kernel in the columns."""
        if self.dq.dim() == 2:
            return self
        return Factors(*(None if factor is None else factor.flatten(1) for factor in self))  # pyright: ignore[reportArgumentType]

    def fused(self, groups: int = 1) -> tuple[Tensor, Tensor]:
        """`down` and `up` of `update` in the form of the base layer's weight.

        Args:
            groups: Groups of the up-projection.

        Returns:
            down of shape (2r, in, *kernel) and up of shape (out, 2r / groups, *ones); r in the
            place of 2r for Vanilla T-LoRA.
        """
        if self.dq.dim() == 2:
            return self.update()[:2]
        down, up, *_ = self.flat().update()
        if self.dlam is not None and groups > 1:
            down = pair(down[: len(self.dq)], down[len(self.dq) :], groups)
        ones = (1,) * (self.dp.dim() - 2)
        return down.unflatten(1, self.dq.shape[1:]), up.reshape(*up.shape, *ones)

    def whole(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Q, P and lambda of the paper, start and difference together."""
        dq, dp, dlam, q0, p0, lam0 = self
        if dlam is None or q0 is None or p0 is None or lam0 is None:
            return dq, dp, None
        return q0 + dq, p0 + dp, lam0 + dlam


class Update(NamedTuple):
    """The masked update `up down` of a linear layer, and what its gradients are made with.

    Args:
        down: Shape (2r, in), or (r, in) for Vanilla T-LoRA.
        up: Shape (out, 2r), or (out, r).
        scale: By what the gradient of `lam Q` becomes that of `Q`: `lam m s`, of shape (r, 1), or
            for Vanilla T-LoRA `m s`.
        q: `Q m s`, by which it becomes that of `lam`, of shape (r, in, 1); None if it isn't needed.
    """

    down: Tensor
    up: Tensor
    scale: float | Tensor
    q: Tensor | None


def pair(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """Concatenate along the ranks (dimension 0), group by group as a grouped convolution does."""
    if groups == 1:
        return torch.cat([first, second])
    split = (groups, first.shape[0] // groups, *first.shape[1:])
    return torch.cat([first.reshape(split), second.reshape(split)], dim=1).flatten(0, 1)


def interleave(rows: Tensor) -> Tensor:
    """Bring the second half of the rows between the rows of the first half."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def delta_weight(down: Tensor, up: Tensor, gate: Tensor, groups: int = 1) -> Tensor:
    """The weight of the update, `up diag(gate) down`, of shape (out, in, *kernel).

    Args:
        down: Shape (ranks, in, *kernel).
        up: Shape (out, ranks / groups, *ones).
        gate: Mask times scaling of shape (ranks,).
        groups: Groups of the up-projection.
    """
    gated = gate.reshape(-1, 1) * down.flatten(1)
    delta = up.flatten(1).unflatten(0, (groups, -1)) @ gated.unflatten(0, (groups, -1))
    return delta.flatten(0, 1).unflatten(1, down.shape[1:])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would multiply a tensor of floats, None without autocast."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def align_ranks(active: Tensor, leading: int, tokens: int | None) -> Tensor | None:
    """Bring the active ranks of a forward to the rows of one layer's input.

    Args:
        active: Active ranks of shape (), (batch,) or (batch, tokens).
        leading: Size of the input's first dimension: the batch, or a b-major multiple of it.
        tokens: Size of the input's second dimension, None if it has no token axis.

    Returns:
        Shape (), (leading,) or (leading, tokens); None if several samples can't be told apart.
        Where the input has no token axis, a sample's noisiest token, the one with the fewest ranks,
        stands for the sample.
    """
    if active.numel() == 1:
        return active.reshape(())
    if active.dim() == 2 and active.numel() == leading:
        return active.flatten()
    if active.dim() == 2 and tokens is None:
        active = active.amin(dim=1)
    repeats = leading // active.shape[0]
    if leading % active.shape[0]:
        return None
    return active if repeats == 1 else active.repeat_interleave(repeats, dim=0)
