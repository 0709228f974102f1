"""The files of the authors' code (github.com/ControlGenAI/T-LoRA), for SDXL and for FLUX."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..weights.files import AdapterFile, read_yaml
from .adapter import Adapter, AdapterLayer
from .facts import Given, TrainingFacts, number
from .tensors import factors_of, grouped, one_rank, rank_of

_FIELDS = {
    "_lora.down.weight": "q",
    "_lora.up.weight": "p",
    "_lora.q_layer.weight": "q",
    "_lora.p_layer.weight": "p",
    "_lora.lambda_layer": "lam",
    "_lora.base_q.weight": "q0",
    "_lora.base_p.weight": "p0",
    "_lora.base_lambda": "lam0",
}
_SDXL, _FLUX = "the authors' SDXL trainer", "the authors' FLUX trainer"
_FLUX_TARGETS = {
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out": "to_out.0",
    "to_q_proj": "add_q_proj",
    "to_k_proj": "add_k_proj",
    "to_v_proj": "add_v_proj",
}
_FLUX_LAYER = re.compile(r"(single_)?transformer_blocks\.\d+\.attn\.processor\.")
_SINGLE_BLOCKS = "single_transformer_blocks."
_SINGLE_TARGETS = ("to_q", "to_k", "to_v")


def is_official_sdxl(file: AdapterFile) -> bool:
    """Whether a file is the authors' for SDXL."""
    return _is_official(file) and not is_official_flux(file)


def is_official_flux(file: AdapterFile) -> bool:
    """Whether a file is the authors' for FLUX."""
    return _is_official(file) and all(_FLUX_LAYER.match(name) for name in file.tensors)


def read_official_sdxl(file: AdapterFile, given: Given) -> Adapter:
    """The adapter of the authors' SDXL trainer, vanilla or orthogonal.

    The rank schedule is in its logs/hparams.yml alone, which is looked for beside the file.
    """
    layers = {
        _sdxl_name(name): fields for name, fields in grouped(file.tensors, _FIELDS, _SDXL).items()
    }
    path = given.hparams or _hparams_beside(file.path)
    found = {} if path is None else _sdxl_facts(_mapping(path), str(path))
    joined = given.facts.joined({**found, "num_train_timesteps": 1000.0}, str(path))
    return _adapter("unet", layers, joined, _SDXL, ())


def read_official_flux(file: AdapterFile, given: Given) -> Adapter:
    """The adapter of the authors' FLUX trainer, with an hparams.yml as that for SDXL."""
    layers, dead = {}, 0
    for name, fields in grouped(file.tensors, _FIELDS, _FLUX).items():
        block, _, target = name.partition(".attn.processor.")
        if target not in _FLUX_TARGETS:
            raise ValueError(f"{name[:200]!r} is no layer of {_FLUX}.")
        if block.startswith(_SINGLE_BLOCKS) and target not in _SINGLE_TARGETS:
            dead += 1
            continue
        layers[f"{block}.attn.{_FLUX_TARGETS[target]}"] = fields
    path = given.hparams or _hparams_beside(file.path)
    found = {} if path is None else _flux_facts(_mapping(path), str(path))
    # its pipelines count to 1000 and pass a thousandth of it on; its schedule has no exponent
    fixed = {"num_train_timesteps": 1.0, "schedule_exponent": 1.0}
    notes = (
        f"{dead} adapters of single blocks, which the trainer makes but never calls, are left out.",
    )
    joined = given.facts.joined({**found, **fixed}, str(path))
    return _adapter("transformer", layers, joined, _FLUX, notes if dead else ())


def _is_official(file: AdapterFile) -> bool:
    return any(".processor." in name for name in file.tensors) and all(
        name.endswith(tuple(_FIELDS)) for name in file.tensors
    )


def _sdxl_name(name: str) -> str:
    block, dot, target = name.removeprefix("unet.").partition(".processor.")
    if not dot or target not in ("to_q", "to_k", "to_v", "to_out"):
        raise ValueError(f"{name[:200]!r} is no layer of {_SDXL}.")
    return f"{block}.{'to_out.0' if target == 'to_out' else target}"


def _adapter(
    component: str,
    layers: Mapping[str, Mapping[str, Tensor]],
    facts: TrainingFacts,
    format: str,
    notes: tuple[str, ...],
) -> Adapter:
    r = one_rank((rank_of(name, fields) for name, fields in layers.items()), format)
    schedule = facts.schedule(r, format)
    return Adapter(
        component,
        {  # its updates have no scaling, which is LoRA's alpha = r
            name: AdapterLayer(factors_of(name, fields), schedule, float(r))
            for name, fields in layers.items()
        },
        notes,
    )


def _hparams_beside(path: Path) -> Path | None:
    places = (path.parent / "logs" / "hparams.yml", path.parent.parent / "logs" / "hparams.yml")
    return next((place for place in places if place.is_file()), None)


def _mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold names and values, got {type(content).__name__}.")
    return content


def _sdxl_facts(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    # the authors' generation takes these two defaults as well
    min_rank = number(values.get("min_rank", 1), "min_rank", where, int)
    exponent = number(values.get("alpha_rank_scale", 1), "alpha_rank_scale", where)
    trainer = values.get("trainer_class")
    kinds = {"sdxl_tlora": "power", "sdxl_lora": "constant"}
    if not isinstance(trainer, str) or trainer not in kinds:
        raise ValueError(f"{where} has trainer_class {trainer!r}, which must be in {list(kinds)}.")
    facts = {"rank_schedule": kinds[trainer], "min_rank": min_rank, "schedule_exponent": exponent}
    return facts if kinds[trainer] == "power" else {"rank_schedule": "constant"}


def _flux_facts(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(values.get("tlora"), bool):
        raise ValueError(f"{where} doesn't say whether tlora was on.")
    if not values["tlora"]:
        return {"rank_schedule": "constant"}
    min_rank = number(values.get("min_rank"), "min_rank", where, int)
    return {"rank_schedule": "power", "min_rank": min_rank}
