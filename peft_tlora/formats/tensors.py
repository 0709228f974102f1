"""Tensors by their names in a file, sorted into layers, and those of this package's own format."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..functional import Factors
from ..weights.encoding import Encoded, decode_schedule, encode_schedule
from ..weights.fit import check_projections
from ..weights.names import FIELDS, OWN_FIELDS, check_name
from ..weights.start import Recipe, rebuild
from .adapter import AdapterLayer

_START = ("q0", "p0", "lam0")


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
    """The factors among a layer's tensors of another program: Q, P and lam whole, and their start.

    Raises:
        ValueError: If there is no down- or up-projection.
    """
    if "q" not in fields or "p" not in fields:
        raise ValueError(f"Layer {layer[:200]} has only {', '.join(sorted(fields))}.")
    lam, lam0 = (
        None if value is None else value.reshape(-1, 1)
        for value in (fields.get("lam"), fields.get("lam0"))
    )
    try:
        return from_whole(fields["q"], fields["p"], lam, fields.get("q0"), fields.get("p0"), lam0)
    except ValueError as error:
        raise ValueError(f"Layer {layer[:200]}: {error}") from None


def from_whole(
    q: Tensor,
    p: Tensor,
    lam: Tensor | None = None,
    q0: Tensor | None = None,
    p0: Tensor | None = None,
    lam0: Tensor | None = None,
) -> Factors:
    """Factors as differences from their start, in float32 or more; without one they are whole.

    Raises:
        ValueError: If they haven't the shapes of their start, or aren't of floating point.
    """
    if q0 is None or p0 is None or lam is None or lam0 is None:
        return Factors(q, p, lam, q0, p0, lam0)
    differences = []
    for whole, start in ((q, q0), (p, p0), (lam, lam0)):
        if whole.shape != start.shape:
            raise ValueError(
                f"a tensor of shape {tuple(whole.shape)} has a start of shape {tuple(start.shape)}."
            )
        if not whole.is_floating_point():
            raise ValueError(f"a factor is of {whole.dtype}, not of floating point.")
        wide = torch.float64 if whole.dtype == torch.float64 else torch.float32
        differences.append(whole.to(wide) - start.to(wide))
    dq, dp, dlam = differences
    return Factors(dq, dp, dlam, q0, p0, lam0)


def rank_of(layer: str, fields: Mapping[str, Tensor]) -> int:
    """The rank that a layer's down-projection has."""
    q = fields.get("q", fields.get("dq"))
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
            raise ValueError(_NO_SCHEDULE["dlam" in fields].format(name))
        if "dq" not in fields or "dp" not in fields:
            raise ValueError(f"Layer {name} has only {', '.join(sorted(fields))}.")
        encoded = decode_schedule(fields["schedule"], rank_of(name, fields), name)
        factors = Factors(*(fields.get(field) for field in Factors._fields))  # pyright: ignore[reportArgumentType]
        factors, recipe = _with_start(name, factors, encoded)
        layers[name] = AdapterLayer(factors, *encoded[:3], recipe)
    return layers


_NO_SCHEDULE = {
    False: "Layer {} has no lora_schedule and no lora_lambda: it is plain LoRA, which T-LoRA has "
    "nothing to tell of. If it is a Vanilla T-LoRA whose schedule a host left out, pass the config "
    "that it was trained with, as config=TLoraConfig(...) or --config FILE.",
    True: "Layer {} has no lora_schedule: the file holds the trained tensors of a T-LoRA adapter "
    "alone, as a host saves them that keeps what requires grad. They mean something only with the "
    "config that they were trained with: pass it, as config=TLoraConfig(...) or --config FILE.",
}


def _with_start(layer: str, factors: Factors, encoded: Encoded) -> tuple[Factors, Recipe | None]:
    """The factors with the start that the file leaves out, and what that is made of."""
    dq, dp, dlam, *start = factors
    if any(factor is not None for factor in start) or dlam is None or encoded.recipe is None:
        return factors, None
    try:
        check_projections(dq, dp, len(dq))
    except ValueError as error:
        raise ValueError(f"Layer {layer}: {error}") from None
    made = rebuild(encoded.recipe, dq, dp, len(dq) // dp.shape[1], layer)
    return Factors(dq, dp, dlam, *made), encoded.recipe


def own_tensors(layers: Mapping[str, AdapterLayer], prefix: str) -> dict[str, Tensor]:
    """The state dict of layers, named as PEFT does after a prefix; inverse of `layers_of_own`."""
    endings = {field: ending for ending, field in FIELDS.items()}
    tensors = {}
    for name, layer in layers.items():
        for field, tensor in layer.factors._asdict().items():
            if tensor is not None and (layer.recipe is None or field not in _START):
                tensors[f"{prefix}{name}{endings[field]}"] = tensor
        encoded = encode_schedule(
            Encoded(layer.schedule, layer.lora_alpha, layer.use_rslora, layer.recipe)
        )
        tensors[f"{prefix}{name}{endings['schedule']}"] = encoded
    return tensors
