"""A linear layer with its masked update: the update alone, to be added, or both at once.

Both have a backward of their own. It keeps the layer's input, the adapter's parameters and the
input of the trained up-projection, as LoRA does, and makes what follows from them again, but in
small layers, where the operators cost more than the memory. Autograd would keep the fused factors
of every layer, which are larger than the parameters, and compute the gradients of the frozen
factors, too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..functional import Factors, add_product

Gate = float | Tensor
# entries of a weight, 128 KB in float32: a layer keeps no more for its backward
_SMALL = 2**15


def add_update(
    result: Tensor,
    x: Tensor,
    factors: Factors,
    gate: Gate,
    dtype: torch.dtype,
    ranks: int | None = None,
) -> Tensor:
    """`result + up diag(gate) down x` with the fused factors of an adapter.

    Args:
        result: Shape (..., out).
        x: Shape (..., in).
        factors: Factors without kernel and groups.
        gate: Mask times scaling: a number, or a tensor that broadcasts to (..., ranks), the two
            columns of a rank alike.
        dtype: The dtype of the computation.
        ranks: How many ranks are computed and gated, None for all.
    """
    if not torch.is_grad_enabled():
        fused = factors.leading(ranks).to(dtype).fused()
        return _add_fused(result, x, *fused, gate, dtype)[0]
    return _AddUpdate.apply(result, x, gate, dtype, ranks, *factors)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    gate: Gate,
    ranks: int | None = None,
) -> Tensor:
    """The output of a frozen linear layer with the update, all of one dtype.

    Added to the output, an update costs rows x (in + out) x ranks operations; added to the weight,
    which can be done if all samples have one mask, in x out x ranks. The cheaper of both is done.

    Args:
        x: Shape (..., in).
        weight: Frozen weight of shape (out, in).
        bias: Frozen bias of shape (out,).
        factors: Factors without kernel and groups.
        gate: Mask times scaling, as for `add_update`.
        ranks: How many ranks are computed and gated, None for all.
    """
    if not torch.is_grad_enabled():
        fused = factors.leading(ranks).fused()
        return _adapted_linear(x, weight, bias, *fused, gate)[0]
    return _AdaptedLinear.apply(x, weight, bias, gate, ranks, *factors)


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        gate: Gate,
        dtype: torch.dtype,
        ranks: int | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        factors = Factors(*tensors)  # pyright: ignore[reportArgumentType]
        part = factors.leading(ranks)
        fused = part.to(dtype).fused()
        output, hidden = _add_fused(result, x, *fused, gate, dtype)
        ctx.result_dtype, ctx.dtype, ctx.ranks = result.dtype, dtype, ranks
        kept = fused if _is_small(factors) else (None, None)
        _save(ctx, gate, x, _trained(hidden, gate, len(part.dq)), *kept, *factors)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        gate, x, hidden, down, up, *saved = _saved(ctx)
        factors = Factors(*saved)
        if down is None or torch.is_grad_enabled():  # a second derivative needs their graph
            down, up = factors.leading(ctx.ranks).to(ctx.dtype).fused()
        rows, outer = _cast(ctx.dtype, x, gradient)
        if torch.is_grad_enabled():
            hidden = _trained_of(rows, down, gate, hidden)
        inner = _gated(outer @ up, gate)
        x_gradient = _cast(x.dtype, inner @ down)[0] if ctx.needs_input_grad[1] else None
        gradients = _factor_gradients(factors, rows, hidden, inner, outer)
        return _cast(ctx.result_dtype, gradient)[0], x_gradient, None, None, None, *gradients


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Gate,
        ranks: int | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        factors = Factors(*tensors)  # pyright: ignore[reportArgumentType]
        part = factors.leading(ranks)
        fused = part.fused()
        output, hidden, updated = _adapted_linear(x, weight, bias, *fused, gate)
        if hidden is not None:
            hidden = _trained(hidden, gate, len(part.dq))
        ctx.ranks = ranks
        kept = (updated, *fused) if _is_small(factors) else (None, None, None)
        _save(ctx, gate, x, weight, hidden, *kept, *factors)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        gate, x, weight, hidden, updated, down, up, *saved = _saved(ctx)
        factors = Factors(*saved)
        part = factors.leading(ctx.ranks)
        if down is None or torch.is_grad_enabled():  # a second derivative needs their graph
            updated = None
            down, up = part.fused()
        x_gradient = None
        if hidden is None:
            r = len(part.dq)
            own = _leading(gate, r)
            hidden = _gated(linear(x, down[:r]), own)
            p = up if part.p0 is None else up[:, :r] + up[:, r:]
            inner = _gated(gradient @ p, own)  # the sum of both columns of a rank
            if ctx.needs_input_grad[0]:
                updated = _updated(weight, down, up, gate) if updated is None else updated
                x_gradient = gradient @ updated
        else:
            if torch.is_grad_enabled():
                hidden = _trained_of(x, down, gate, hidden)
            inner = _gated(gradient @ up, gate)
            if ctx.needs_input_grad[0]:
                x_gradient = _accumulate(gradient @ weight, inner, down.mT)
        gradients = _factor_gradients(factors, x, hidden, inner, gradient)
        return x_gradient, None, None, None, None, *gradients


def _add_fused(
    result: Tensor, x: Tensor, down: Tensor, up: Tensor, gate: Gate, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The result with the update, and the input of the up-projection but for a number's gate."""
    (rows,) = _cast(dtype, x)
    hidden = linear(rows, down)
    if isinstance(gate, Tensor):
        hidden = hidden * gate
        return add_product(result, hidden, up), hidden
    return add_product(result, hidden, up, gate), hidden


def _adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, gate: Gate
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output, and what it was made of: one of two, None for the other.

    They are the input of the up-projection but for a number's gate, and the updated weight.
    """
    one_mask = not isinstance(gate, Tensor) or gate.dim() <= 1
    if one_mask and x.shape[:-1].numel() * sum(weight.shape) > weight.numel():
        updated = _updated(weight, down, up, gate)
        return linear(x, updated, bias), None, updated
    output, hidden = linear(x, weight, bias), linear(x, down)
    if isinstance(gate, Tensor):
        hidden = hidden * gate
        return _accumulate(output, hidden, up), hidden, None
    return _accumulate(output, hidden, up, gate), hidden, None


def _is_small(factors: Factors) -> bool:
    """Whether a layer's memory matters less than the operators of making it again."""
    return factors.dq.shape[1] * len(factors.dp) <= _SMALL


def _updated(weight: Tensor, down: Tensor, up: Tensor, gate: Gate) -> Tensor:
    if isinstance(gate, Tensor):
        return torch.addmm(weight, up * gate, down)
    return torch.addmm(weight, up, down, alpha=gate)


def _accumulate(result: Tensor, hidden: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """`add_product` to a tensor that nobody else has: in place, unless there must be a graph."""
    if torch.is_grad_enabled() or not result.is_contiguous():
        return add_product(result, hidden, up, scale)
    rows = result.shape[:-1].numel()
    hidden = hidden.reshape(rows, hidden.shape[-1])
    result.view(rows, result.shape[-1]).addmm_(hidden, up.mT, alpha=scale)
    return result


def _trained(hidden: Tensor, gate: Gate, r: int) -> Tensor:
    """The gated input of the trained up-projection, which has half of the columns or all."""
    trained = hidden[..., :r]
    return trained.contiguous() if isinstance(gate, Tensor) else _gated(trained, gate).contiguous()


def _trained_of(x: Tensor, down: Tensor, gate: Gate, like: Tensor) -> Tensor:
    """What `_trained` kept, with the graph that a second derivative needs."""
    r = like.shape[-1]
    return _gated(linear(x, down[:r]), _leading(gate, r))


def _factor_gradients(
    factors: Factors, x: Tensor, hidden: Tensor, inner: Tensor, outer: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the factors, None for the frozen ones.

    Args:
        factors: The factors.
        x: Input of shape (..., in).
        hidden: Gated input of the trained up-projection, of shape (..., computed ranks).
        inner: Gradient of the output of the trained down-projection, shaped like `hidden`, or of
            both columns of a rank, whose sum it is.
        outer: Gradient of the output of the layer, of shape (..., out).
    """
    dq, dp, dlam, q0, _, lam0 = factors
    rows, computed = x.shape[:-1].numel(), hidden.shape[-1]
    if inner.shape[-1] > computed:
        inner = inner[..., :computed] + inner[..., computed:]
    hidden, inner = hidden.reshape(rows, computed), inner.reshape(rows, computed)
    # the product of this shape is faster than its transpose
    (p_gradient,) = _cast(dp.dtype, (hidden.mT @ outer.reshape(rows, len(dp))).mT)
    q_gradient = inner.mT @ x.reshape(rows, dq.shape[1])  # of diag(lam) Q yet
    lam_gradient = None
    if dlam is not None and q0 is not None and lam0 is not None:
        lam_gradient = (q_gradient * (q0[:computed] + dq[:computed])).sum(1, keepdim=True)
        q_gradient = (lam0[:computed] + dlam[:computed]) * q_gradient
        (lam_gradient,) = _cast(dlam.dtype, lam_gradient)
    (q_gradient,) = _cast(dq.dtype, q_gradient)
    rest = len(dq) - computed
    if rest > 0:  # the gradient of a rank that wasn't computed is zero
        q_gradient, p_gradient = pad(q_gradient, (0, 0, 0, rest)), pad(p_gradient, (0, rest))
        lam_gradient = None if lam_gradient is None else pad(lam_gradient, (0, 0, 0, rest))
    return q_gradient, p_gradient, lam_gradient, None, None, None


def _cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Tensors in a dtype; most are in it, and asking is cheaper than `to`."""
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def _gated(hidden: Tensor, gate: Gate) -> Tensor:
    return hidden if isinstance(gate, float) and gate == 1 else hidden * gate


def _leading(gate: Gate, r: int) -> Gate:
    """The gate of the trained half of the columns."""
    return gate[..., :r] if isinstance(gate, Tensor) and gate.dim() else gate


def _save(ctx: Any, gate: Gate, *tensors: Tensor | None) -> None:
    ctx.number = None if isinstance(gate, Tensor) else gate
    ctx.save_for_backward(gate if isinstance(gate, Tensor) else None, *tensors)


def _saved(ctx: Any) -> tuple:
    gate, *tensors = ctx.saved_tensors
    return gate if ctx.number is None else ctx.number, *tensors
