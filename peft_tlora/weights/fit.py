"""Whether tensors can be an adapter's, and whether they are for a model's layers."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..functional import Factors

# far above any use, and low enough that no file can ask for the memory of a machine
MAX_RANK = 65536


def weight_of(modules: Mapping[str, nn.Module], layer: str) -> Tensor | None:
    """The weight under an adapter's layer, among a model's modules by their names."""
    # PEFT puts the adapter of attention's output into the base of the whole layer's
    for name in (f"{layer}.base_layer", layer, layer.replace(".base_layer", "")):
        module = modules.get(name)
        if module is not None:
            weight = getattr(module, "weight", getattr(module, "in_proj_weight", None))
            return weight if isinstance(weight, Tensor) else None
    return None


def check_fit(name: str, q: Tensor, p: Tensor, weight: Tensor) -> None:
    """Raise unless a layer's factors are for a weight of such a shape.

    Raises:
        ValueError: If they aren't.
    """
    found, wanted = (p.shape[0], *q.shape[1:]), tuple(weight.shape)
    # quantised weights are packed, and transformers' Conv1D holds its weight transposed
    if weight.is_floating_point() and found not in (wanted, wanted[::-1]):
        raise ValueError(
            f"The adapter doesn't fit: its layer {name} is for a weight of shape {found}, that of "
            f"the model is {wanted}. Is it for another base model?"
        )


def check_projections(q: Tensor, p: Tensor, r: int) -> None:
    """Raise unless two tensors can be a down- and an up-projection of rank r.

    Raises:
        ValueError: If they can't.
    """
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"its rank must lie in [1, {MAX_RANK}], got {r}.")
    if not 2 <= q.dim() <= 5 or p.dim() != q.dim() or q.shape[0] != r or 0 in q.shape + p.shape:
        raise ValueError(
            f"its factors have shapes {tuple(q.shape)} and {tuple(p.shape)}, not (r, in, ...) and "
            f"(out, r, ...) with r={r}."
        )
    whole_groups = r % p.shape[1] == 0 and len(p) % (r // p.shape[1]) == 0
    if not whole_groups or any(size != 1 for size in p.shape[2:]):
        raise ValueError(f"the up-projection of shape {tuple(p.shape)} is not one of rank {r}.")


def check_factors(factors: Factors, r: int, *, start_follows: bool = False) -> None:
    """Raise unless tensors can be the factors of a layer of rank r.

    Args:
        factors: The tensors.
        r: The rank.
        start_follows: Whether the start may be missing, as it is made of a seed.

    Raises:
        ValueError: If they can't.
    """
    check_projections(factors.dq, factors.dp, r)
    dq, dp, *rest = factors
    start = [f for f in rest[1:] if f is not None]
    is_whole = len(start) == (0 if rest[0] is None else 3)
    if not is_whole and not (start_follows and not start):
        raise ValueError("only some of the singular values and frozen factors are there.")
    for tensor, wanted in zip(rest, ((r, 1), dq.shape, dp.shape, (r, 1)), strict=True):
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} should be {tuple(wanted)}.")
    for tensor in factors:
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"a factor is of {tensor.dtype}, not of floating point.")
