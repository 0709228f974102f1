"""A schedule as a tensor that travels with the weights, so that a file describes itself.

Hosts cast, average and copy a file's tensors without asking what they are. So the tensor is of
whole numbers from 0 to 7, which every floating-point dtype down to float8_e5m2 holds exactly and
whose average with themselves is themselves, with a checksum that finds a mixture of two.
"""

import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..orthogonal import ORTHO_INITS
from ..schedule import RANK_SCHEDULES, SCHEDULE_FIELDS, TIMESTEP_TYPES, RankSchedule
from .start import Recipe

_VERSION = 1
# the fields and their formats in `struct`; choices are their indices
_FIELDS = {
    "version": "B",
    "rank_schedule": "B",
    "schedule_exponent": "d",
    "min_rank": "d",
    "is_fraction": "?",
    "num_train_timesteps": "d",
    "timestep_reversed": "?",
    "lora_alpha": "d",
    "use_rslora": "?",
    "timestep_type": "b",
    "rank_multiple": "I",
    "choice": "b",
    "seed": "Q",
    "name": "Q",
    "in_features": "I",
}
# then the fingerprint; zero bytes, so that the length is a multiple of 3; checksum
_LAYOUT = struct.Struct(f"<{''.join(_FIELDS.values())}24b2xI")
_NONE = -1  # for an index: no timestep type, no recipe
_NO_RECIPE = {"choice": _NONE, "seed": 0, "name": 0, "in_features": 0}
_DIGITS = 8 * _LAYOUT.size // 3
_TOLERANCE = 0.125  # what averaging in bfloat16 may add
_SHIFTS = np.arange(21, -1, -3)  # of the 8 digits of 3 bytes


class Encoded(NamedTuple):
    """What the tensor of a layer says.

    Args:
        schedule: The layer's rank schedule.
        lora_alpha: LoRA's alpha.
        use_rslora: Whether the scaling is alpha / sqrt(r) in the place of alpha / r.
        recipe: What the start is made of; None if there is none, or the file holds it.
    """

    schedule: RankSchedule
    lora_alpha: float
    use_rslora: bool
    recipe: Recipe | None = None


def encode_schedule(encoded: Encoded) -> Tensor:
    """Write what a layer's tensor says as octal digits, in float16 of shape (digits,)."""
    schedule, lora_alpha, use_rslora, recipe = encoded
    type_ = schedule.timestep_type
    values: dict[str, Any] = {name: getattr(schedule, name) for name in SCHEDULE_FIELDS} | {
        "version": _VERSION,
        "rank_schedule": RANK_SCHEDULES.index(schedule.rank_schedule),
        "min_rank": float(schedule.min_rank),
        "is_fraction": isinstance(schedule.min_rank, float),
        "timestep_type": _NONE if type_ is None else TIMESTEP_TYPES.index(type_),
        "lora_alpha": lora_alpha,
        "use_rslora": use_rslora,
        **_NO_RECIPE,
    }
    fingerprint = (0,) * 24
    if recipe is not None:
        values |= vars(recipe) | {"choice": ORTHO_INITS.index(recipe.choice)}
        fingerprint = recipe.fingerprint
    raw = _LAYOUT.pack(*(values[name] for name in _FIELDS), *fingerprint, 0)
    raw = raw[:-4] + struct.pack("<I", zlib.crc32(raw[:-4]))
    words = np.frombuffer(raw, np.uint8).reshape(-1, 3) @ np.array([1 << 16, 1 << 8, 1])
    digits = words[:, None] >> _SHIFTS & 7
    return torch.from_numpy(digits.ravel().astype(np.float16))


def decode_schedule(tensor: Tensor, r: int, layer: str) -> Encoded:
    """Inverse of `encode_schedule`, of any dtype, for a layer of rank `r`.

    Raises:
        ValueError: If the tensor isn't one schedule of a known version.
    """
    if tensor.shape != (_DIGITS,):
        raise ValueError(
            f"lora_schedule of layer {layer[:200]} must have the shape ({_DIGITS},), got "
            f"{tuple(tensor.shape)}: the file was written by another version of peft_tlora. Save "
            "the adapter again with this one."
        )
    values = tensor.detach().cpu().double().numpy()
    digits = values.round()
    whole = (np.abs(values - digits) <= _TOLERANCE) & (digits >= 0) & (digits <= 7)
    fields = _fields(digits.astype(np.int64)) if whole.all() else None
    if fields is None:
        broken = "doesn't add up" if whole.all() else "isn't of whole numbers from 0 to 7"
        raise ValueError(
            f"lora_schedule of layer {layer[:200]} {broken}. Either files of different schedules, "
            "ranks or seeds were averaged or a file was multiplied by a weight, which leaves no "
            "schedule: average adapters of one config, with weights whose sum is 1, or combine "
            "them with add_weighted_adapter. Or the file is damaged."
        )
    said: dict[str, Any] = dict(zip(_FIELDS, fields, strict=False))
    known = (
        said["rank_schedule"] < len(RANK_SCHEDULES)
        and _NONE <= said["timestep_type"] < len(TIMESTEP_TYPES)
        and _NONE <= said["choice"] < len(ORTHO_INITS)
        and (said["is_fraction"] or said["min_rank"].is_integer())
    )
    if said["version"] != _VERSION or not known:
        raise ValueError(
            f"lora_schedule of layer {layer[:200]} has version {said['version']} or values that "
            f"this peft_tlora doesn't know, which writes version {_VERSION}: install the one that "
            "wrote the file."
        )
    type_ = said["timestep_type"]
    said["rank_schedule"] = RANK_SCHEDULES[said["rank_schedule"]]
    said["timestep_type"] = None if type_ == _NONE else TIMESTEP_TYPES[type_]
    said["min_rank"] = said["min_rank"] if said["is_fraction"] else int(said["min_rank"])
    try:
        schedule = RankSchedule(r, **{name: said[name] for name in SCHEDULE_FIELDS})
    except ValueError as error:
        raise ValueError(f"lora_schedule of layer {layer[:200]}: {error}") from None
    recipe = None
    if said["choice"] != _NONE:
        said["choice"] = ORTHO_INITS[said["choice"]]
        made_of = {name: said[name] for name in _NO_RECIPE}
        recipe = Recipe(**made_of, fingerprint=fields[len(_FIELDS) :])
    return Encoded(schedule, said["lora_alpha"], said["use_rslora"], recipe)


def _fields(digits: np.ndarray) -> tuple | None:
    words = (digits.reshape(-1, 8) << _SHIFTS).sum(1)
    raw = (words[:, None] >> np.array([16, 8, 0]) & 255).astype(np.uint8).tobytes()
    fields = _LAYOUT.unpack(raw)
    return fields[:-1] if fields[-1] == zlib.crc32(raw[:-4]) else None
