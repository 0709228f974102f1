"""State dicts as hosts save them, also with the trained tensors alone, which a config completes."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import TLoraConfig
from ..functional import Factors
from ..timestep.denoisers import Denoiser, find_denoiser
from ..weights.files import AdapterFile, parse_json, read_json
from ..weights.fit import check_projections, check_trained, of_layer
from ..weights.names import COMPONENT, OWN_FIELDS, check_name, component_of, parsed
from ..weights.start import Recipe, canonical_name, new_start
from .adapter import Adapter, AdapterLayer
from .facts import Given
from .own import choose_component, is_diffusers, is_peft
from .tensors import grouped, layers_of_own, rank_of

_FORMAT = "a state dict with T-LoRA"


def is_state_dict(file: AdapterFile) -> bool:
    """Whether a file has the tensors of a T-LoRA or a plain LoRA by names that a host gave them."""
    own = is_peft(file) or is_diffusers(file)
    return bool(file.tensors) and not own and all(parsed(name) for name in file.tensors)


def read_state_dict(file: AdapterFile, given: Given) -> Adapter:
    """The adapter in a model's state dict.

    What wrappers and pipelines put before the names, and the adapter's name in them, are left out.
    If the file holds the trained tensors alone, as hosts save them that keep what requires grad,
    the start is made from the config. The names in the base tell an adapter's layers from those of
    modules around it.

    Raises:
        ValueError: If the file holds plain LoRA, is for another base, or needs a config or
            contradicts it.
    """
    base, config = given.base, given.config
    known = set() if base is None else {name for name, _ in base.named_modules()}
    parts = _by_component(file.tensors, known)
    notes: tuple[str, ...] = ()
    chosen = ""
    if parts.keys() != {""}:
        counts = {name: len(part) for name, part in parts.items()}
        chosen, notes = choose_component(file.path, counts, given.component)
    tensors = parts[chosen] if base is None else _in_base(parts[chosen], base, known)
    if config is None:
        layers = layers_of_own(tensors, _FORMAT)
    else:
        layers = _completed(tensors, config, base)
        if base is None and any(layer.recipe for layer in layers.values()):
            notes += (
                "The start is made from the names of the layers in the file, such as "
                f"{next(iter(layers))}: --base makes sure that they are the model's own.",
            )
    return Adapter(chosen or given.component or component_of(layers), layers, notes)


def read_config(source: str | os.PathLike[str]) -> TLoraConfig:
    """Read a config from JSON.

    Args:
        source: PEFT's adapter_config.json, a folder with it, any other file with arguments of
            `TLoraConfig`, or these as JSON themselves, from their `{` on.

    Raises:
        ValueError: If it is another file, or the config of something else.
    """
    path: Any = "The config"
    if str(source).lstrip().startswith("{"):
        values = parse_json(str(source), path)
    else:
        path = Path(source)
        path = path / "adapter_config.json" if path.is_dir() else path
        values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold names and values, got {type(values).__name__}.")
    kind = values.pop("peft_type", None)
    if kind not in (None, "TLORA"):
        raise ValueError(f"{path} is the config of {str(kind)[:80]}, not of a T-LoRA adapter.")
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(TLoraConfig)})
    if unknown:
        raise ValueError(
            f"{path} has {', '.join(unknown)[:200]}, which is no argument of TLoraConfig."
        )
    try:
        config = TLoraConfig(**values)
        for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
            re.compile(pattern)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{path} is no TLoraConfig: {error}") from None
    return config


def _by_component(tensors: Mapping[str, Tensor], known: set[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each of a pipeline's models, "" if the names have none, by PEFT's names."""
    matches = {name: match for name in tensors if (match := parsed(name))}
    for name in tensors.keys() - matches.keys():
        raise ValueError(f"{name[:200]!r} is no part of a file of {_FORMAT}.")
    adapters = {match["adapter"] for match in matches.values()}
    if len(adapters) > 1:
        names = ", ".join(sorted(map(str, adapters)))
        raise ValueError(f"The file holds several adapters, {names[:200]}: leave one in it.")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, match in matches.items():
        layer = canonical_name(match["layer"])
        component, _, rest = layer.partition(".")
        if layer in known or not COMPONENT.fullmatch(component):
            component, rest = "", layer
        part = parts.setdefault(component, {})
        key = f"{canonical_name(rest)}.{match['part']}.weight"
        if key in part:
            raise ValueError(f"{name[:200]!r} says again what another tensor of its layer said.")
        part[key] = tensors[name]
    return parts


def _in_base(tensors: Mapping[str, Tensor], base: nn.Module, known: set[str]) -> dict[str, Tensor]:
    """The tensors by the names in the base, without those of the modules around it."""
    layers = {name: name.rpartition(".lora_")[0] for name in tensors}
    for count in range(1 + max(layer.count(".") for layer in layers.values())):
        short = {".".join(name.split(".")[count:]): tensor for name, tensor in tensors.items()}
        if {name.rpartition(".lora_")[0] for name in short} <= known and len(short) == len(tensors):
            return short
    missing = next((layer for layer in layers.values() if layer not in known), "")
    raise ValueError(
        f"The adapter doesn't fit: {type(base).__name__} has no layer {missing[:200]}. Is it for "
        "another base model?"
    )


def _completed(
    tensors: Mapping[str, Tensor], config: TLoraConfig, base: nn.Module | None
) -> dict[str, AdapterLayer]:
    """The layers whose trained tensors these are."""
    layers = grouped(tensors, OWN_FIELDS, _FORMAT)
    if any("schedule" in fields for fields in layers.values()):
        raise ValueError("The file says itself how the adapter was trained: leave the config out.")
    unsaid = [x for x in ("num_train_timesteps", "timestep_reversed") if getattr(config, x) is None]
    if base is None and unsaid and config.timestep_type != "log_sigma":
        raise ValueError(
            f"The config doesn't say {' and '.join(unsaid)}, which the training took from the base "
            "model then: pass it (base=..., --base FOLDER), or say in the config what it was, such "
            "as num_train_timesteps=1000 and timestep_reversed=False."
        )
    return {name: _layer(name, fields, config, base) for name, fields in layers.items()}


def _layer(
    name: str, fields: Mapping[str, Tensor], config: TLoraConfig, base: nn.Module | None
) -> AdapterLayer:
    """The layer that a training with the config has made these tensors in."""
    check_name(name)
    r = rank_of(name, fields)
    check_trained(name, fields, config)
    factors = Factors(*(fields.get(field) for field in Factors._fields))  # pyright: ignore[reportArgumentType]
    try:
        check_projections(factors.dq, factors.dp, r)
    except ValueError as error:
        raise ValueError(f"Layer {name}: {error}") from None
    found = None if base is None else find_denoiser(base, name)
    denoiser, inside = found[1:] if found else (Denoiser(), name)
    recipe = None
    if factors.dlam is not None and factors[3:] == (None, None, None):
        # PEFT names a layer inside an adapted one, as of attention, by where it is then
        factors, recipe = _with_start(factors, config, inside.replace(".base_layer", ""))
    schedule = config.schedule(
        r, denoiser.num_train_timesteps, denoiser.timestep_reversed, denoiser.timestep_type
    )
    lora_alpha = of_layer(config.alpha_pattern, name, config.lora_alpha)
    return AdapterLayer(factors, schedule, lora_alpha, config.use_rslora, recipe)


def _with_start(factors: Factors, config: TLoraConfig, name: str) -> tuple[Factors, Recipe]:
    """The factors with the start that a training with the config made of a name, and its recipe."""
    dq, dp, dlam, *_ = factors
    choice: Any = config.ortho_init
    groups = len(dq) // dp.shape[1]
    start, recipe = new_start(dq, dp, groups, choice, seed=config.init_seed or 0, name=name)
    return Factors(dq, dp, dlam, *start), recipe
