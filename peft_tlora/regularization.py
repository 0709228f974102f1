"""The reference's optional regulariser: how far the trained factors are from orthonormal."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .layers.layer import TLoraLayer
from .layers.protocol import groups_of


def orthogonality_loss(model: nn.Module, adapter_names: Iterable[str] | None = None) -> Tensor:
    """`||P^T P - I||^2 + ||Q Q^T - I||^2`, summed over the T-LoRA layers of a model.

    Add it, times a weight of your choice, to the training loss to keep the ranks independent. At an
    orthogonal initialisation it is next to 0: 1e-5 in a layer of 640 features at r = 16. The norms
    are Frobenius norms, as in the official code of T-LoRA, which has the term but doesn't use it.
    In a layer smaller than the rank, the ranks that fit count; the groups of a grouped convolution
    count one by one.

    Args:
        model: Any module that holds T-LoRA layers: a PeftModel, a model with an injected adapter.
        adapter_names: Names of the adapters; None for the active ones of each layer.

    Returns:
        A scalar with a gradient to P (`lora_B`) and Q (`lora_A`).

    Raises:
        ValueError: If no layer has such an adapter with an orthogonal initialisation.
    """
    names = None if adapter_names is None else set(adapter_names)
    losses = [
        _distance(p.mT, fitting) + _distance(q, fitting)
        for layer in model.modules()
        if isinstance(layer, TLoraLayer)
        for name in (layer.active_adapters if names is None else sorted(names))
        if name in layer.lora_lambda
        for q, p in [_factors(layer, name)]
        for fitting in [min(q.shape[-1], p.shape[-2])]
    ]
    if not losses:
        wanted = "active adapter" if names is None else f"adapter named {sorted(names)}"
        raise ValueError(
            f"{type(model).__name__} has no T-LoRA layer whose {wanted} has an orthogonal "
            "initialisation; the loss is not defined for ortho_init=None."
        )
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _factors(layer: TLoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Q of shape (groups, ranks, in) and P of shape (groups, out, ranks)."""
    groups = groups_of(layer)
    start = layer.start(adapter)
    q = (start.q0 + layer.lora_A[adapter].weight).flatten(1)
    p = (start.p0 + layer.lora_B[adapter].weight).flatten(1)
    return q.unflatten(0, (groups, -1)), p.unflatten(0, (groups, -1))


def _distance(rows: Tensor, fitting: int) -> Tensor:
    """Of the first `fitting` of (groups, ranks, size) vectors from orthonormal ones."""
    rows = rows[..., :fitting, :]
    gram = rows @ rows.mT
    return (gram - torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)).square().sum()
