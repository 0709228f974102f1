"""Whether tensors can be an adapter's, and whether they are for a model's layers."""

from collections.abc import Mapping

from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..config import TLoraConfig
from ..functional import Factors

_TRAINED = {"dq": "lora_A", "dp": "lora_B", "dlam": "lora_lambda"}
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


def check_fit(layer: str, q: Tensor, p: Tensor, weight: Tensor | None, model: str) -> None:
    """Raise unless a layer's factors are for the weight that a model has under its name.

    Raises:
        ValueError: If they aren't, or there is none.
    """
    found = (p.shape[0], *q.shape[1:])
    if weight is None:
        problem = f"{model} has no layer {layer[:200]} with a weight"
    # quantised weights are packed, and transformers' Conv1D holds its weight transposed
    elif weight.is_floating_point() and found not in (tuple(weight.shape), weight.shape[::-1]):
        problem = (
            f"layer {layer} is for a weight of shape {found}, {model}'s is {tuple(weight.shape)}"
        )
    else:
        return
    raise ValueError(f"The adapter doesn't fit: {problem}. Is it for another base model?")


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


def of_layer(pattern: Mapping[str, int] | None, layer: str, default: int) -> int:
    """The value of a layer in a pattern of PEFT."""
    return (pattern or {}).get(get_pattern_key(list(pattern or {}), layer), default)


def check_trained(layer: str, fields: Mapping[str, Tensor], config: TLoraConfig) -> None:
    """Raise unless a layer's tensors are what a training with a config saves of it.

    Args:
        layer: Name of the layer.
        fields: Its tensors by the fields of `Factors`, with or without the start.
        config: The config.

    Raises:
        ValueError: If they are of another training, or the start is neither there nor to be made.
    """
    found = [part for field, part in _TRAINED.items() if field in fields]
    wanted = list(_TRAINED.values())[: 2 if config.ortho_init is None else 3]
    if found != wanted:
        raise ValueError(
            f"With ortho_init={config.ortho_init!r} layer {layer[:200]} needs {', '.join(wanted)}, "
            f"the source has {', '.join(found)}. Is it plain LoRA, or was it trained with another "
            "ortho_init?"
        )
    r = of_layer(config.rank_pattern, layer, config.r)
    if len(fields["dq"]) != r:
        raise ValueError(
            f"Layer {layer[:200]} has rank {len(fields['dq'])} in the source and {r} in the config,"
            " which is of another training."
        )
    if config.ortho_init is None or "q0" in fields:
        return
    if config.ortho_source == "weight":
        raise ValueError(
            "ortho_source='weight': the adapter started from the base's weights, and the source "
            "doesn't hold the start. Save it where it was trained with get_peft_model_state_dict "
            "or save_pretrained."
        )
    if config.init_seed is None:
        raise ValueError(
            "init_seed=None: a training then draws its seed and puts it into its config, which is "
            "the one to pass."
        )
