"""Files of trainers that name layers with underscores: an sd-scripts fork, Takenoko, LyCORIS."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ..functional import Factors
from ..weights.files import AdapterFile
from ..weights.names import component_of
from .adapter import Adapter, AdapterLayer
from .facts import Given, TrainingFacts, in_unit_of, number
from .names import underscored
from .recomputed import recompute
from .tensors import factors_of, grouped, one_rank, rank_of

_LORA = {"lora_down.weight": "q", "lora_up.weight": "p", "alpha": "alpha"}
_ORTHO = {"q_layer.weight": "q", "p_layer.weight": "p", "lambda_layer": "lam", "alpha": "alpha"}
_BASE = {"base_q.weight": "q0", "base_p.weight": "p0"}
_METADATA = "ss_tlora_"
_IRRELEVANT = ("init", "sig_type")  # how the factors started, which the file has as tensors


class Trainer(NamedTuple):
    """How a trainer writes its files.

    Args:
        title: Its name.
        prefixes: What the names of the denoiser's layers may begin with.
        base_lambda: Its name of the frozen singular values, None if it doesn't save them.
    """

    title: str
    prefixes: tuple[str, ...]
    base_lambda: str | None


_SD_SCRIPTS = Trainer("the sd-scripts fork", ("lora_unet_",), "base_lambda_buf")
_TAKENOKO = Trainer("Takenoko", ("t_lora_unet_",), "base_lambda")
_LYCORIS = Trainer("LyCORIS", ("lycoris_", "lora_unet_"), None)


def is_sd_scripts(file: AdapterFile) -> bool:
    """Whether a file is of the sd-scripts fork."""
    return _is_of(file, _SD_SCRIPTS) and (
        any(name.startswith(_METADATA) for name in file.metadata)
        or any(name.endswith(".base_lambda_buf") for name in file.tensors)
    )


def is_takenoko(file: AdapterFile) -> bool:
    """Whether a file is Takenoko's."""
    return _is_of(file, _TAKENOKO)


def is_lycoris(file: AdapterFile) -> bool:
    """Whether a file is LyCORIS' with its algorithm tlora."""
    return (
        _is_of(file, _LYCORIS)
        and any(name.endswith(".lambda_layer") for name in file.tensors)
        and not any(".base_" in name for name in file.tensors)
    )


def read_sd_scripts(file: AdapterFile, given: Given) -> Adapter:
    """The adapter of the sd-scripts fork that writes ss_tlora_* metadata."""
    found = _metadata_facts(file.metadata)
    facts = given.facts.joined(found, f"the metadata of {file.path.name}")
    return _read(file, _SD_SCRIPTS, given.base, facts, lambda name, factors, weight: factors)


def read_takenoko(file: AdapterFile, given: Given) -> Adapter:
    """The adapter of Takenoko (Wan).

    Takenoko masks timesteps above its `tlora_boundary_timestep` (875 by default) by a schedule of
    their own, and none below. This package has no such schedule: with a boundary of 0 the file is
    taken over exactly, with another one only for what runs below it, as
    `rank_schedule="constant"`.
    """
    facts = given.facts.joined({"num_train_timesteps": 1000.0}, "Takenoko's code")
    facts.require("boundary_timestep", format=_TAKENOKO.title)
    if facts.rank_schedule is None and facts.boundary_timestep == 0:
        facts = facts.joined({"rank_schedule": "power"}, "a boundary of 0")
    if facts.boundary_timestep != 0 and facts.rank_schedule != "constant":
        raise ValueError(
            f"Trained with boundary_timestep={facts.boundary_timestep}, the mask follows a schedule"
            " above that timestep and all ranks are active below, which no schedule of this package"
            " says. Pass rank_schedule='constant' (--rank-schedule constant) to use the adapter "
            "below it, as with Wan 2.2's low-noise expert."
        )
    return _read(file, _TAKENOKO, given.base, facts, lambda name, factors, weight: factors)


def read_lycoris(file: AdapterFile, given: Given) -> Adapter:
    """The adapter of LyCORIS' algorithm tlora.

    It has no frozen factors. LyCORIS makes them anew from the weights of the base model whenever it
    loads the file, and so does this function: they are right if the base has the very weights that
    the training started from. The adapter's notes say how far the result agrees with the trained
    factors, which stay close to where they started; see `recompute`.

    Raises:
        ValueError: If the base is quantised or another, or a fact is missing.
    """
    facts = given.facts
    facts.require("sig_type", format=_LYCORIS.title)
    agreement: dict[str, float] = {}

    def complete(name: str, factors: Factors, weight: Tensor) -> Factors:
        whole, agreement[name] = recompute(name, factors, weight, facts.sig_type or "")
        return whole

    adapter = _read(file, _LYCORIS, given.base, facts, complete)
    return Adapter(adapter.component, adapter.layers, (*adapter.notes, *_trust(agreement)))


def _trust(agreement: Mapping[str, float]) -> tuple[str, ...]:
    worst = min(agreement, key=agreement.__getitem__)
    middle = sorted(agreement.values())[len(agreement) // 2]
    return (
        "The frozen factors were recomputed from the base model. Their directions agree with the "
        f"trained ones to {middle:.3f} in the median layer and {agreement[worst]:.3f} in {worst} "
        "(1 is perfect, chance is near 0).",
    )


def _is_of(file: AdapterFile, trainer: Trainer) -> bool:
    fields = _fields(trainer)
    return any(name.startswith(trainer.prefixes) for name in file.tensors) and all(
        name.partition(".")[2] in fields for name in file.tensors
    )


def _fields(trainer: Trainer) -> dict[str, str]:
    if trainer.base_lambda is None:
        return _ORTHO
    return {**_LORA, **_ORTHO, **_BASE, trainer.base_lambda: "lam0"}


def _metadata_facts(metadata: Mapping[str, str]) -> dict[str, object]:
    kinds = {
        "min_rank": ("min_rank", int),
        "alpha_rank_scale": ("schedule_exponent", float),
        "max_timestep": ("num_train_timesteps", float),
    }
    found: dict[str, object] = {}
    unknown = {name for name in metadata if name.startswith(_METADATA)} - {
        _METADATA + name for name in (*kinds, *_IRRELEVANT)
    }
    if unknown:
        raise ValueError(
            f"The metadata has {', '.join(sorted(unknown))[:200]}, which this package doesn't know:"
            " the file is of another trainer, or a newer one."
        )
    for name, (field, kind) in kinds.items():
        text = metadata.get(_METADATA + name)
        if text is not None:
            found[field] = number(text, _METADATA + name, "the metadata", kind)
    return {**found, "rank_schedule": "power"} if found else found


def _read(
    file: AdapterFile,
    trainer: Trainer,
    base: nn.Module | None,
    facts: TrainingFacts,
    complete: Callable[[str, Factors, Tensor], Factors],
) -> Adapter:
    """The adapter in a file, each layer's factors completed from its base weight."""
    if base is None:
        raise ValueError(
            f"Files of {trainer.title} name layers with underscores: pass the base model "
            "(base=..., --base FOLDER) to tell them apart."
        )
    names = underscored(base)
    tensors, others = _of_denoiser(file, trainer)
    layers, ranks = {}, []
    for key, fields in _layers(tensors, trainer).items():
        if key not in names:
            raise ValueError(
                f"{type(base).__name__} has no layer {key[:200]!r}. Is the file for another base?"
            )
        name = names[key]
        weight: Tensor = base.get_submodule(name).weight  # pyright: ignore[reportAssignmentType]
        ranks.append(rank_of(name, fields))
        r = one_rank(ranks, trainer.title)
        factors = complete(name, _shaped(factors_of(name, fields), weight), weight)
        schedule = in_unit_of(base, facts.schedule(r, trainer.title))
        layers[name] = AdapterLayer(factors, schedule, _alpha(name, fields))
    notes = (f"{others} tensors of text encoders are left out.",) if others else ()
    return Adapter(component_of(layers), layers, notes)


def _alpha(name: str, fields: Mapping[str, Tensor]) -> float:
    alpha = fields.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"Layer {name} has an alpha of shape {tuple(alpha.shape)}, not a number.")
    return float(rank_of(name, fields) if alpha is None else alpha)


def _of_denoiser(file: AdapterFile, trainer: Trainer) -> tuple[dict[str, Tensor], int]:
    """The denoiser's tensors without the prefix, and the number of those of text encoders."""
    tensors, others = {}, 0
    for name, tensor in file.tensors.items():
        prefix = next((p for p in trainer.prefixes if name.startswith(p)), None)
        if prefix is not None:
            tensors[name.removeprefix(prefix)] = tensor
        elif name.startswith("lora_te"):
            others += 1
        else:
            raise ValueError(f"{name[:200]!r} is no part of a file of {trainer.title}.")
    return tensors, others


def _layers(tensors: Mapping[str, Tensor], trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """The layers' tensors; where there are both, the orthogonal ones are those that act."""
    ortho = {name.partition(".")[0] for name in tensors if name.endswith(".q_layer.weight")}
    acting = {
        name: tensor
        for name, tensor in tensors.items()
        if name.partition(".")[0] not in ortho or ".lora_" not in name
    }
    fields = {f".{ending}": field for ending, field in _fields(trainer).items()}
    return grouped(acting, fields, trainer.title)


def _shaped(factors: Factors, weight: Tensor) -> Factors:
    """The factors of a convolution in its shape; some trainers write them as matrices."""
    if weight.dim() == 2 or factors.dq.dim() != 2:
        return factors
    r, ones = len(factors.dq), (1,) * (weight.dim() - 2)

    def down(q: Tensor) -> Tensor:
        if q[0].numel() != weight[0].numel():
            raise ValueError(
                f"Factors of shape {tuple(q.shape)} don't fit a weight of {tuple(weight.shape)}. "
                "Is the file for another base model?"
            )
        return q.reshape(r, *weight.shape[1:])

    dq, dp, dlam, q0, p0, lam0 = factors
    return Factors(
        down(dq),
        dp.reshape(*dp.shape, *ones),
        dlam,
        None if q0 is None else down(q0),
        None if p0 is None else p0.reshape(*p0.shape, *ones),
        lam0,
    )
