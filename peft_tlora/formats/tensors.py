"""Tensors by their names in a file, sorted into layers, and those of this package's own format."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..encoding import decode_recipe, decode_schedule, encode_schedule
from ..frozen import rebuild
from ..functional import Factors
from .adapter import AdapterLayer, check_name

_FIELDS = {
    ".lora_A.weight": "q",
    ".lora_B.weight": "p",
    ".lora_lambda.weight": "lam",
    ".lora_A_init.weight": "q0",
    ".lora_B_init.weight": "p0",
    ".lora_lambda_init.weight": "lam0",
    ".lora_schedule.weight": "schedule",
}
# what diffusers' conversions of the state dicts of U-Nets and text encoders make of these names
_DIFFUSERS_FIELDS = {
    name.replace("lora_A", f"{style}.down").replace("lora_B", f"{style}.up"): field
    for style in ("lora", "lora_linear_layer")
    for name, field in _FIELDS.items()
}
OWN_FIELDS = {**_FIELDS, **_DIFFUSERS_FIELDS}


def grouped(
    tensors: Mapping[str, Tensor], fields: Mapping[str, str], format: str
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by their field.

    Args:
        tensors: Tensors by their names in a file.
        fields: Field by the ending of a name.
        format: The format, for the message.

    Raises:
        ValueError: If a tensor has none of the endings, or two are one field of a layer.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    endings = sorted(fields, key=len, reverse=True)
    for name, tensor in tensors.items():
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        if ending is None:
            raise ValueError(
                f"{name[:200]!r} is no part of a file of {format}: is this a mixture of formats?"
            )
        layer = layers.setdefault(name.removesuffix(ending), {})
        if fields[ending] in layer:
            raise ValueError(f"{name[:200]!r} says again what another tensor of its layer said.")
        layer[fields[ending]] = tensor
    return layers


def factors_of(layer: str, fields: Mapping[str, Tensor]) -> Factors:
    """The factors among a layer's tensors, with the singular values as vectors.

    Raises:
        ValueError: If there is no down- or up-projection.
    """
    if "q" not in fields or "p" not in fields:
        raise ValueError(f"Layer {layer[:200]} has only {', '.join(sorted(fields))}.")
    values = {name: fields.get(name) for name in Factors._fields}
    for name in ("lam", "lam0"):
        value = values[name]
        values[name] = None if value is None else value.flatten()
    return Factors(**values)  # pyright: ignore[reportArgumentType]


def rank_of(layer: str, fields: Mapping[str, Tensor]) -> int:
    """The rank that a layer's down-projection has."""
    q = fields.get("q")
    if q is None or q.dim() < 2:
        raise ValueError(f"Layer {layer[:200]} has no down-projection of shape (r, in, ...).")
    return q.shape[0]


def one_rank(ranks: Iterable[int], format: str) -> int:
    """The rank of all layers.

    Raises:
        ValueError: If they differ.
    """
    found = sorted(set(ranks))
    if len(found) != 1:
        raise ValueError(
            f"The layers have ranks {found}, and {format} masks them all by the rank of the "
            "largest. No schedule of this package does that, so the file can't be taken over."
        )
    return found[0]


def layers_of_own(tensors: Mapping[str, Tensor], format: str) -> dict[str, AdapterLayer]:
    """The layers of a state dict of this package.

    Raises:
        ValueError: If a layer has no schedule, or a tensor belongs to something else.
    """
    layers = {}
    for name, fields in grouped(tensors, OWN_FIELDS, format).items():
        check_name(name)
        if "schedule" not in fields:
            raise ValueError(
                f"Layer {name} has no lora_schedule: it is plain LoRA, or from another program."
            )
        decoded = decode_schedule(fields["schedule"], rank_of(name, fields))
        factors = _with_frozen(name, factors_of(name, fields), fields["schedule"])
        layers[name] = AdapterLayer(factors, *decoded)
    return layers


def _with_frozen(layer: str, factors: Factors, schedule: Tensor) -> Factors:
    """The factors with the frozen ones that a compact file leaves out."""
    recipe = decode_recipe(schedule)
    q, p, lam, *frozen = factors
    fits = p.dim() == q.dim() and p.shape[1] > 0
    if recipe is None or lam is None or any(f is not None for f in frozen) or not fits:
        return factors
    p0, lam0, q0 = rebuild(recipe, q, p, len(q) // p.shape[1], layer)
    return Factors(q, p, lam, q0.to(q.dtype), p0.to(q.dtype), lam0.to(q.dtype))


def own_tensors(layers: Mapping[str, AdapterLayer], prefix: str) -> dict[str, Tensor]:
    """The state dict of layers, named as PEFT does after a prefix; inverse of `layers_of_own`."""
    endings = {field: ending for ending, field in _FIELDS.items()}
    tensors = {}
    for name, layer in layers.items():
        for field, tensor in layer.factors._asdict().items():
            if tensor is not None:
                tensors[f"{prefix}{name}{endings[field]}"] = tensor
        encoded = encode_schedule(layer.schedule, layer.lora_alpha, layer.use_rslora)
        tensors[f"{prefix}{name}{endings['schedule']}"] = encoded
    return tensors
