"""The masked update of a linear layer, added to its output or to its weight.

Both have a backward of their own. It keeps the layer's input and the adapter's parameters, as LoRA
does, and makes what follows from them again; autograd would keep the fused factors of every layer,
which are larger than the parameters, and compute the gradients of the frozen factors, too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .functional import Factors, add_product
from .integrations.torch import has_transforms

Gate = float | Tensor


def add_update(
    result: Tensor, x: Tensor, factors: Factors, gate: Gate, dtype: torch.dtype
) -> Tensor:
    """`result + up diag(gate) down x` with the fused factors of an adapter.

    Args:
        result: Shape (..., out).
        x: Shape (..., in).
        factors: Factors without kernel and groups.
        gate: Mask times scaling: a number, or a tensor that broadcasts to (..., ranks), the two
            columns of a rank alike.
        dtype: The dtype of the computation. The factors are fused in their own.
    """
    if torch.compiler.is_compiling() or has_transforms():
        return _add_update(result, x, factors, gate, dtype)
    return _AddUpdate.apply(result, x, gate, dtype, *factors)


def with_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, gate: Gate
) -> Tensor:
    """The output of a linear layer whose weight has the update added, all of one dtype.

    This costs in x out x ranks and not rows x (in + out) x ranks operations: less for large inputs.

    Args:
        x: Shape (..., in).
        weight: Frozen weight of shape (out, in).
        bias: Frozen bias of shape (out,).
        factors: Factors without kernel and groups.
        gate: Mask times scaling: a number or a tensor of shape (ranks,).
    """
    if has_transforms():
        return linear(x, _updated(weight, factors, gate), bias)
    return _WithUpdate.apply(x, weight, bias, gate, *factors)


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, gate: Gate, dtype: torch.dtype, *factors: Tensor | None
    ) -> Tensor:
        ctx.result_dtype, ctx.dtype = result.dtype, dtype
        _save(ctx, gate, x, *factors)
        return _add_update(result, x, Factors(*factors), gate, dtype)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        gate, x, *saved = _saved(ctx)
        factors = Factors(*saved)
        down, up = _cast(ctx.dtype, *factors.fused())
        rows, outer = _cast(ctx.dtype, x, gradient)
        r = len(factors.q)
        hidden = _gated(linear(rows, down[:r]), _first(gate, r))
        inner = _gated(outer @ up, gate)
        x_gradient = _cast(x.dtype, inner @ down)[0] if ctx.needs_input_grad[1] else None
        if len(down) > r:  # both columns of a rank hold its trained factor
            inner = inner[..., :r] + inner[..., r:]
        gradients = _factor_gradients(factors, rows, hidden, inner, outer)
        return _cast(ctx.result_dtype, gradient)[0], x_gradient, None, None, *gradients


class _WithUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Gate,
        *factors: Tensor | None,
    ) -> Tensor:
        _save(ctx, gate, x, weight, *factors)
        return linear(x, _updated(weight, Factors(*factors), gate), bias)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        gate, x, weight, *saved = _saved(ctx)
        factors = Factors(*saved)
        q, p, lam = factors[:3]
        first = _first(gate, len(q))
        hidden = _gated(linear(x, q if lam is None else lam[:, None] * q), first)
        inner = _gated(gradient @ p, first)  # the sum of both columns of a rank
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ _updated(weight, factors, gate)
        gradients = _factor_gradients(factors, x, hidden, inner, gradient)
        return x_gradient, None, None, None, *gradients


def _add_update(
    result: Tensor, x: Tensor, factors: Factors, gate: Gate, dtype: torch.dtype
) -> Tensor:
    rows, down, up = _cast(dtype, x, *factors.fused())
    hidden = linear(rows, down)
    if isinstance(gate, Tensor):
        return add_product(result, hidden * gate, up)
    return add_product(result, hidden, up, gate)


def _updated(weight: Tensor, factors: Factors, gate: Gate) -> Tensor:
    down, up = factors.fused()
    if isinstance(gate, Tensor):
        return torch.addmm(weight, up * gate, down)
    return torch.addmm(weight, up, down, alpha=gate)


def _factor_gradients(
    factors: Factors, x: Tensor, hidden: Tensor, inner: Tensor, outer: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the factors, None for the frozen ones.

    Args:
        factors: The factors.
        x: Input of shape (..., in).
        hidden: Gated input of the trained up-projection, of shape (..., r).
        inner: Gradient of the output of the trained down-projection, of shape (..., r).
        outer: Gradient of the output of the layer, of shape (..., out).
    """
    q, p, lam = factors[:3]
    x, hidden, inner, outer = (
        t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (x, hidden, inner, outer)
    )
    (p_gradient,) = _cast(p.dtype, outer.mT @ hidden)
    (scaled,) = _cast(q.dtype, inner.mT @ x)  # the gradient of diag(lam) Q
    if lam is None:
        return scaled, p_gradient, None, None, None, None
    return lam[:, None] * scaled, p_gradient, (scaled * q).sum(1), None, None, None


def _cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Tensors in a dtype; most are in it, and asking is cheaper than `to`."""
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def _gated(hidden: Tensor, gate: Gate) -> Tensor:
    return hidden if isinstance(gate, float) and gate == 1 else hidden * gate


def _first(gate: Gate, r: int) -> Gate:
    """The gate of the trained half of the columns."""
    return gate[..., :r] if isinstance(gate, Tensor) and gate.dim() else gate


def _save(ctx: Any, gate: Gate, *tensors: Tensor | None) -> None:
    ctx.number = None if isinstance(gate, Tensor) else gate
    ctx.save_for_backward(gate if isinstance(gate, Tensor) else None, *tensors)


def _saved(ctx: Any) -> tuple:
    gate, *tensors = ctx.saved_tensors
    return gate if ctx.number is None else ctx.number, *tensors
