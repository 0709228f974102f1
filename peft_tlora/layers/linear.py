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

from ..functional import Update
from .update import Folded, Masked, delta_weight, halves, is_small

Base = tuple[Tensor, Tensor | None]  # weight and bias


def add_update(result: Tensor, x: Tensor, masked: Masked) -> Tensor:
    """`result + up diag(mask) down x`.

    Args:
        result: Shape (..., out).
        x: Shape (..., in).
        masked: The update.
    """
    if torch.is_grad_enabled():
        return _MaskedLinear.apply(x, *masked.factors[:3], result, masked, None)
    return _compute(x, masked, result, None, trained=False)[0]


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, masked: Masked) -> Tensor:
    """The output of a frozen linear layer of the input's dtype with the update.

    Args:
        x: Shape (..., in).
        weight: Frozen weight of shape (out, in).
        bias: Frozen bias of shape (out,).
        masked: The update.
    """
    if torch.is_grad_enabled():
        return _MaskedLinear.apply(x, *masked.factors[:3], None, masked, (weight, bias))
    return _compute(x, masked, None, (weight, bias), trained=False)[0]


class _MaskedLinear(torch.autograd.Function):
    """Adds an update to `result`, or computes it with the base layer if there is none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dq: Tensor,
        dp: Tensor,
        dlam: Tensor | None,
        result: Tensor | None,
        masked: Masked,
        base: Base | None,
    ) -> Tensor:
        output, folded, update, hidden = _compute(x, masked, result, base, trained=True)
        ctx.small = small = is_small(masked.factors)
        ctx.factors, ctx.mask, ctx.dtype = masked.factors, masked.mask, masked.dtype
        ctx.result_dtype = None if result is None else result.dtype
        ctx.with_base, ctx.again = folded is not None and folded.with_base, masked.again
        if hidden is not None and dlam is not None:  # of the trained up-projection alone
            hidden = hidden[:, : hidden.shape[1] // 2]
            hidden = hidden if small else hidden.contiguous()
        weight = None if base is None else base[0]
        kept = ()
        if small and folded is not None:
            kept, ctx.scale = (folded.weight, folded.down, folded.up, folded.q), folded.scale
        elif small:
            down, up, ctx.scale, q = update  # pyright: ignore[reportGeneralTypeIssues]
            kept = None, down, up, q
        # saved although ctx has them, so that torch finds out who changes them before the backward
        ctx.save_for_backward(x, hidden, weight, dq, dp, dlam, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        dtype = ctx.dtype
        needs_x, *_, needs_result, _, _ = ctx.needs_input_grad
        result_gradient = _cast(gradient, ctx.result_dtype) if needs_result else None
        if torch.is_grad_enabled():  # for a second derivative
            return *_differentiable(ctx, gradient), result_gradient, None, None
        x, hidden, base, _, _, _, *kept = ctx.saved_tensors
        folded = hidden is None
        gate, weight = ctx.mask.rows, None
        if ctx.small:
            weight, down, up, q = kept
            scale = ctx.scale
        else:
            own = Masked(ctx.factors, ctx.mask, dtype)
            update = own.made(trained=True) if ctx.again is None else ctx.again()
            down, up, scale, q = update
            if folded:
                down, up = halves(update)
                weight = delta_weight(update, ctx.mask, base, passing=True) if needs_x else None
        rows = _cast(x, dtype).reshape(-1, x.shape[-1])
        plain = gradient.reshape(-1, gradient.shape[-1])
        outer = _cast(plain, dtype)
        inner = torch.mm(outer, up)
        if folded:
            hidden = torch.mm(rows, down.mT)
            if gate is not None:
                hidden, inner = hidden * ctx.mask.half, inner * ctx.mask.half
            factors: Any = outer, weight
        else:
            inner = inner if gate is None else inner * gate
            factors = inner, down
        x_gradient = None
        if needs_x:
            if base is None or ctx.with_base:
                x_gradient = _cast(_product(*factors), x.dtype)
            else:
                x_gradient = _accumulate(torch.mm(plain, base), *factors)
            x_gradient = x_gradient.view(x.shape)
        if not folded and q is not None:  # of both columns of a rank
            r = q.shape[0]
            inner = inner[:, :r] + inner[:, r:]
        gradients = _factor_gradients(ctx, scale, q, rows, hidden, inner, outer)
        return x_gradient, *gradients, result_gradient, None, None


def _compute(
    x: Tensor, masked: Masked, result: Tensor | None, base: Base | None, *, trained: bool
) -> tuple[Tensor, Folded | None, Update | None, Tensor | None]:
    """The output, and what it was made with: one weight, or the factors and the hidden values."""
    folded, update, hidden = masked.folded, masked.update, None
    weight, bias = (None, None) if base is None else base
    if folded is None:
        update = masked.made(trained=trained)
        if masked.folds(x.shape, weight):
            folded = masked.fold(update, weight)
    if folded is not None and folded.with_base:
        return _linear(x, folded.weight, bias), folded, update, None
    shape, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
    if folded is not None:
        factors = _cast(rows, masked.dtype), folded.weight.mT
    else:
        hidden = torch.mm(_cast(rows, masked.dtype), update.down.mT)  # pyright: ignore[reportOptionalMemberAccess]
        hidden = hidden if masked.mask.rows is None else hidden * masked.mask.rows
        factors = hidden, update.up.mT  # pyright: ignore[reportOptionalMemberAccess]
    if result is None:
        output = _accumulate(linear(rows, weight, bias), *factors)  # pyright: ignore[reportArgumentType]
    else:
        output = result.reshape(-1, result.shape[-1])
        if output.dtype == masked.dtype and factors[1].dim() == 2:
            output = torch.addmm(output, *factors)
        else:
            output = output + _product(*factors)
    return output.view(*shape, output.shape[1]), folded, update, hidden


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose weight is (out, in), or (batch, out, in) for an input (batch, n, in)."""
    if weight.dim() == 2:
        return linear(x, weight, bias)
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias, x, weight.mT)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """A matrix (rows, k) times one of (k, n), or times several (batch, k, n) part by part."""
    if weight.dim() == 2:
        return torch.mm(rows, weight)
    return torch.bmm(rows.view(weight.shape[0], -1, weight.shape[1]), weight).flatten(0, 1)


def _accumulate(result: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Add `_product` in place to a matrix that nobody else has."""
    if result.dtype == rows.dtype and weight.dim() == 2:
        return result.addmm_(rows, weight)
    return result.add_(_product(rows, weight))


def _differentiable(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the input and the trained factors, with a graph of their own."""
    x, _, base, *_ = ctx.saved_tensors
    mask = ctx.mask
    update = Masked(ctx.factors, mask, ctx.dtype).made(trained=False)
    hidden = linear(x.to(ctx.dtype), update.down)
    output = linear(hidden if mask.gate is None else hidden * mask.gate, update.up)
    output = output.to(gradient.dtype)
    if base is not None:
        output = output + linear(x, base)
    inputs = (x, *ctx.factors[:3])
    wanted = [i for i in range(len(inputs)) if ctx.needs_input_grad[i]]
    found = torch.autograd.grad(output, [inputs[i] for i in wanted], gradient, create_graph=True)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, value in zip(wanted, found, strict=True):
        gradients[i] = value
    return tuple(gradients)


def _factor_gradients(
    ctx: Any,
    scale: float | Tensor,
    q: Tensor | None,
    x: Tensor,
    hidden: Tensor,
    inner: Tensor,
    outer: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of the trained factors.

    Args:
        ctx: The context of the autograd function.
        scale: As in `Update`.
        q: As in `Update`.
        x: Input of shape (rows, in).
        hidden: Gated input of the trained up-projection, of shape (rows, computed ranks).
        inner: Sum of the gradients of the gated outputs of both columns of a rank, shaped like
            `hidden`.
        outer: Gradient of the output of the layer, of shape (rows, out).
    """
    dq, dp, dlam, *_ = ctx.factors
    if ctx.small:
        p_gradient = torch.mm(outer.mT, hidden)
    else:  # the product of this shape is faster than its transpose
        p_gradient = torch.mm(hidden.mT, outer).mT
    q_gradient = torch.mm(inner.mT, x)  # of diag(lam m s) Q yet
    lam_gradient = None
    if dlam is not None and q is not None:
        lam_gradient = torch.bmm(q_gradient.unsqueeze(1), q).squeeze(2)
        lam_gradient = _cast(lam_gradient, dlam.dtype)
    if isinstance(scale, Tensor) or scale != 1:
        q_gradient = q_gradient * scale
    p_gradient, q_gradient = _cast(p_gradient, dp.dtype), _cast(q_gradient, dq.dtype)
    rest = dq.shape[0] - hidden.shape[1]
    if rest > 0:  # the gradient of a rank that wasn't computed is zero
        q_gradient, p_gradient = pad(q_gradient, (0, 0, 0, rest)), pad(p_gradient, (0, rest))
        lam_gradient = None if lam_gradient is None else pad(lam_gradient, (0, 0, 0, rest))
    return q_gradient, p_gradient, lam_gradient


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype; most are in it, and asking is cheaper than `to`."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
