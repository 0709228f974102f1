"""What there is to know of a T-LoRA file."""

import os
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TLoraConfig
from ..functional import Factors
from ..timestep.denoisers import describe as describe_denoiser
from ..weights.files import AdapterFile, open_file
from .adapter import Adapter, AdapterLayer
from .facts import TrainingFacts
from .families import family_of
from .plain import spectrum
from .reading import FORMATS, format_of, read_adapter

# lets a file be read whose schedule is unknown; the report then leaves it out
_NO_MASK = TrainingFacts(rank_schedule="constant", num_train_timesteps=1000.0)

_UNREAD: dict[str, Any] = dict.fromkeys(("component", "family", "ortho", "schedule"))
_UNREAD |= {"ranks": {}, "lora_alpha": [], "scaling": [], "kinds": {}, "layers": {}}


def inspect_file(
    source: str | os.PathLike[str],
    *,
    facts: TrainingFacts | None = None,
    base: nn.Module | None = None,
    component: str | None = None,
    hparams: str | os.PathLike[str] | None = None,
    config: TLoraConfig | None = None,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """What a file says, as values for JSON.

    The arguments are those of `read_adapter`. What isn't known is None, with a warning.

    Returns:
        format, file, bytes, tensors, component, family, schedule (and per layer: rank, kind,
        moved, effective_rank), and warnings. `moved` is the Frobenius norm of the change since the
        initialisation relative to the initial product P0 diag(lam0) Q0, None for Vanilla T-LoRA,
        whose start isn't in the file. `effective_rank` is that of the update at full rank: the
        exponential of the entropy of its normalised singular values.

    Raises:
        ValueError: If the file is damaged or of no known format, or is plain LoRA, or has trained
            tensors alone and no config.
    """
    file = open_file(source, allow_pickle=allow_pickle)
    name = format_of(file)
    report = {
        "format": name,
        "format_title": FORMATS[name].title,
        "file": str(file.path),
        "bytes": file.path.stat().st_size,
        "tensors": len(file.tensors),
    }
    given = {"base": base, "component": component, "hparams": hparams, "config": config}
    adapter, known, warnings = _read(file, name, facts, given)
    if adapter is None:
        return {**report, **deepcopy(_UNREAD), "warnings": warnings}
    described = describe(adapter, schedule_known=known)
    damaged = [name for name, layer in described["layers"].items() if not layer["finite"]]
    if damaged:
        warnings.append(f"{len(damaged)} layers have values that aren't finite: {damaged[0]} ...")
    return {**report, **described, "warnings": warnings}


def describe(adapter: Adapter, *, schedule_known: bool = True) -> dict[str, Any]:
    """The part of the report of `inspect_file` that tells of the adapter."""
    ranks = Counter(layer.schedule.r for layer in adapter.layers.values())
    one = next(iter(adapter.layers.values()))
    schedule = asdict(one.schedule)
    del schedule["r"]
    return {
        "component": adapter.component,
        "family": family_of(adapter.layers),
        "ortho": one.is_ortho,
        "ranks": dict(sorted(ranks.items())),
        "lora_alpha": sorted({layer.lora_alpha for layer in adapter.layers.values()}),
        "scaling": sorted({layer.scaling for layer in adapter.layers.values()}),
        "schedule": schedule if schedule_known else None,
        "kinds": dict(Counter(_kind(n, layer) for n, layer in adapter.layers.items())),
        "layers": {name: _layer(layer) for name, layer in adapter.layers.items()},
    }


def _read(
    file: AdapterFile,
    name: str,
    facts: TrainingFacts | None,
    given: Mapping[str, Any],
) -> tuple[Adapter | None, bool, list[str]]:
    """The adapter as far as it can be read, whether its schedule is known, and warnings."""
    try:
        adapter = read_adapter(file, facts=facts, **given)
        return adapter, True, list(adapter.notes)
    except ValueError as error:
        if name == "state_dict":  # plain LoRA, or nothing to be said without its config
            raise
        warnings = [str(error)]
    if name == "lycoris":
        warnings.append("The frozen factors are not in the file; the base model has to give them.")
    if "facts" in FORMATS[name].takes:
        fallback = replace(_NO_MASK, sig_type=None if facts is None else facts.sig_type)
        fallback = replace(fallback, boundary_timestep=875 if name == "takenoko" else None)
        if name.startswith("official"):
            fallback = replace(fallback, num_train_timesteps=None)
        denoiser = None if given["base"] is None else describe_denoiser(given["base"])
        if denoiser is not None:
            fallback = replace(fallback, num_train_timesteps=denoiser.num_train_timesteps)
        try:
            adapter = read_adapter(file, facts=fallback, **given)
            return adapter, False, [*warnings, "The schedule is unknown.", *adapter.notes]
        except ValueError:
            pass
    return None, False, warnings


def _kind(name: str, layer: AdapterLayer) -> str:
    last = [part for part in name.split(".") if not part.isdigit()][-1]
    dimensions = layer.factors.dq.dim() - 2
    return last if dimensions == 0 else f"{last} (Conv{dimensions}d)"


def _layer(layer: AdapterLayer) -> dict[str, Any]:
    factors = Factors(*(None if f is None else f.detach().float() for f in layer.factors))  # pyright: ignore[reportArgumentType]
    moved, values = None, factors.dq.new_zeros(0)
    finite = all(f is None or bool(f.isfinite().all()) for f in factors)
    if layer.groups == 1 and finite:
        values = spectrum(*factors.fused())
        if factors.q0 is not None and factors.p0 is not None and factors.lam0 is not None:
            start = spectrum(factors.lam0 * factors.q0.flatten(1), factors.p0)
            moved = float(values.norm() / start.norm()) if start.any() else None
    return {
        "rank": layer.schedule.r,
        "r_min": layer.schedule.r_min,
        "shape": [len(factors.dp), *factors.dq.shape[1:]],
        "moved": moved,
        "effective_rank": _effective_rank(values),
        "finite": finite,
    }


def _effective_rank(values: Tensor) -> float | None:
    total = values.sum()
    if not total > 0:
        return 0.0 if len(values) else None
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def worst_layers(layers: Mapping[str, Mapping[str, Any]], count: int) -> list[str]:
    """The layers that moved most, the first ones where that isn't known."""
    return sorted(layers, key=lambda name: -(layers[name]["moved"] or 0.0))[:count]
