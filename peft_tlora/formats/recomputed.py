"""Frozen factors that a file lacks, computed anew from the base model's weight."""

import torch
from torch import Tensor

from ..functional import Factors
from .tensors import from_whole

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SIG_TYPES = ("principal", "last", "middle")
# below it the recomputed factors are not those of the training, or it moved very far from them
_LEAST_AGREEMENT = 0.5


def recompute(name: str, factors: Factors, weight: Tensor, sig_type: str) -> tuple[Factors, float]:
    """The frozen factors as the singular triplets of a weight, as LyCORIS takes them.

    A triplet's sign is arbitrary and turns with both its vectors; it is chosen to agree with the
    trained factors. The triplets of close singular values mix under the smallest change of the
    weight (by its size over their distance), so "principal" ones can be trusted further than
    "last" or "middle" ones.

    Args:
        name: The layer, for messages.
        factors: Its trained factors q, p and lam.
        weight: Its base weight.
        sig_type: Which triplets: "principal", "last" or "middle".

    Returns:
        All factors in float32, and how well the directions of the recomputed ones agree with the
        trained ones: the median over the ranks of the smaller of both |cosines|, 1 for equal ones.

    Raises:
        ValueError: If the weight is quantised or missing, the layer is a convolution with a larger
            kernel, or the agreement is below 0.5.
    """
    q, p, lam, *_ = factors  # whole as yet
    if sig_type not in _SIG_TYPES:
        raise ValueError(f"sig_type must be one of {list(_SIG_TYPES)}, got {sig_type!r}.")
    _check_weight(name, weight)
    if lam is None or len(q) > min(weight.shape[:2]):
        raise ValueError(f"Layer {name} has no lambda_layer or a rank above its weight's size.")
    columns, values, rows = _triplets(weight, len(q), sig_type)
    cosines = torch.nn.functional.cosine_similarity(rows, q.float().flatten(1), dim=1)
    others = torch.nn.functional.cosine_similarity(columns, p.float().flatten(1), dim=0)
    agreement = float(torch.minimum(cosines.abs(), others.abs()).median())
    if agreement < _LEAST_AGREEMENT:
        raise ValueError(
            f"Layer {name}: the trained factors agree to {agreement:.2f} only with the recomputed "
            f"start ({sig_type} triplets of the base's weight). Is this another base model, "
            "another sig_type, or a training with use_data_init=False, whose start is lost?"
        )
    sign = torch.where(cosines < 0, -1.0, 1.0)
    q0, p0 = (rows * sign[:, None]).reshape(q.shape), (columns * sign).reshape(p.shape)
    # the trainer subtracts the start in float32, however the file rounds the trained factors
    return from_whole(q, p, lam, q0, p0, values[:, None]), agreement


def _check_weight(name: str, weight: Tensor) -> None:
    if type(weight.data) is not Tensor or weight.dtype not in _DTYPES or weight.is_meta:
        raise ValueError(
            f"Layer {name} has a weight of type {type(weight.data).__name__}, {weight.dtype}, on "
            f"{weight.device}: the frozen factors are singular vectors of the base's weights and "
            "need them as they were in the training, not quantised and not left out."
        )
    if weight[0, 0].numel() > 1:
        raise ValueError(
            f"Layer {name} is a convolution with a kernel of {tuple(weight.shape[2:])}, for which "
            "LyCORIS cuts the singular vectors to 1x1; leave such layers out of the file."
        )


def _triplets(weight: Tensor, r: int, sig_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of a weight: shapes (out, r), (r,) and (r, in)."""
    u, s, vh = torch.linalg.svd(weight.detach().cpu().float().flatten(1), full_matrices=False)
    first = {"principal": 0, "last": len(s) - r, "middle": (len(s) - r) // 2}[sig_type]
    window = slice(first, first + r)
    return u[:, window], s[window].contiguous(), vh[window]
