"""The masked update of a convolution, added to its output: two convolutions of fused factors."""

from typing import Any

import torch
from torch import Tensor

from .update import Masked


def add_convolved(result: Tensor, x: Tensor, masked: Masked, lora_A: Any, lora_B: Any) -> Tensor:
    """Add the masked update of an input.

    Args:
        result: Shape (batch, out, ...).
        x: Shape (batch, in, ...).
        masked: The update, of all ranks' factors as matrices.
        lora_A: The convolution whose kernel `down` has and that says how it moves.
        lora_B: The convolution of one pixel whose kernel `up` has.
    """
    factors = masked.factors
    if not torch.is_grad_enabled():
        down, up, *_ = masked.made(trained=False)
    elif factors.dlam is None:
        down, up, *_ = masked._replace(update=None).made(trained=False)
    else:
        down, up = _Fused.apply(*factors[:3], masked)
    down, up = down.view(-1, *lora_A.weight.shape[1:]), up.view(*up.shape, *lora_B.kernel_size)
    hidden = lora_A._conv_forward(x.to(masked.dtype), down, None)
    hidden = hidden if masked.mask.gate is None else hidden * masked.mask.gate
    return result + lora_B._conv_forward(hidden, up, None)


class _Fused(torch.autograd.Function):
    """Fused factors of a dozen operators with the backward of their formula: of five."""

    @staticmethod
    def forward(
        ctx: Any, dq: Tensor, dp: Tensor, dlam: Tensor, masked: Masked
    ) -> tuple[Tensor, Tensor]:
        ctx.masked = masked._replace(update=None)
        ctx.save_for_backward(dq, dp, dlam)
        update = masked.made(trained=False)
        return update.down, update.up

    @staticmethod
    def backward(ctx: Any, down: Tensor, up: Tensor) -> tuple[Tensor | None, ...]:
        masked: Masked = ctx.masked
        dq, dp, dlam = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            update = masked.made(trained=False)
            found = torch.autograd.grad(
                update[:2], (dq, dp, dlam), (down, up), create_graph=True, materialize_grads=True
            )
            return *found, None
        r, scale = dq.shape[0], masked.mask.scale
        gradient = down[:r] + down[r:]  # of diag(lam m s) Q
        lam: Any
        q, _, lam = masked.factors.whole()
        return (
            (gradient * (lam * scale)).to(dq.dtype),
            up[:, :r].to(dp.dtype),
            (gradient * (q * scale)).sum(1, keepdim=True).to(dlam.dtype),
            None,
        )
