"""A schedule as a tensor that travels with the weights, so that a file describes itself.

Hosts cast, average and copy a file's tensors without asking what they are. So the tensor is of
whole numbers from 0 to 7, which every floating-point dtype down to float8_e5m2 holds exactly and
whose average with themselves is themselves, with a checksum that finds a mixture of two.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..orthogonal import ORTHO_INITS
from ..schedule import RANK_SCHEDULES, TIMESTEP_TYPES, RankSchedule
from .start import Recipe

_VERSION = 1
# version, kind, exponent, min_rank, whether it is a fraction, num_train_timesteps, reversed,
# lora_alpha, use_rslora, timestep type, rank_multiple; of the recipe of the start choice, seed,
# name, in_features and fingerprint; zero bytes, so that the length is a multiple of 3; checksum
_LAYOUT = struct.Struct("<BBdd?d?d?bIbQQI24b2xI")
_NONE = -1  # for an index: no timestep type, no recipe
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
    kind, type_ = schedule.rank_schedule, schedule.timestep_type
    fields = [
        *(_VERSION, RANK_SCHEDULES.index(kind), schedule.schedule_exponent),
        *(float(schedule.min_rank), isinstance(schedule.min_rank, float)),
        *(schedule.num_train_timesteps, schedule.timestep_reversed, lora_alpha, use_rslora),
        _NONE if type_ is None else TIMESTEP_TYPES.index(type_),
        schedule.rank_multiple,
        *(
            (_NONE, 0, 0, 0, *([0] * 24))
            if recipe is None
            else (
                *(ORTHO_INITS.index(recipe.choice), recipe.seed, recipe.name),
                *(recipe.in_features, *recipe.fingerprint),
            )
        ),
    ]
    raw = _LAYOUT.pack(*fields, 0)
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
    version, kind, exponent, min_rank, is_fraction, total, is_reversed = fields[:7]
    lora_alpha, use_rslora, type_, multiple = fields[7:11]
    choice, seed, name, in_features = fields[11:15]
    known = (
        kind < len(RANK_SCHEDULES)
        and _NONE <= type_ < len(TIMESTEP_TYPES)
        and _NONE <= choice < len(ORTHO_INITS)
        and (is_fraction or min_rank.is_integer())
    )
    if version != _VERSION or not known:
        raise ValueError(
            f"lora_schedule of layer {layer[:200]} has version {version} or values that this "
            f"peft_tlora doesn't know, which writes version {_VERSION}: install the one that wrote "
            "the file."
        )
    try:
        schedule = RankSchedule(
            r,
            min_rank if is_fraction else int(min_rank),
            RANK_SCHEDULES[kind],  # pyright: ignore[reportArgumentType]
            exponent,
            total,
            is_reversed,
            None if type_ == _NONE else TIMESTEP_TYPES[type_],  # pyright: ignore[reportArgumentType]
            multiple,
        )
    except ValueError as error:
        raise ValueError(f"lora_schedule of layer {layer[:200]}: {error}") from None
    recipe = None
    if choice != _NONE:
        recipe = Recipe(ORTHO_INITS[choice], seed, name, in_features, fields[15:])  # pyright: ignore[reportArgumentType]
    return Encoded(schedule, lora_alpha, use_rslora, recipe)


def _fields(digits: np.ndarray) -> tuple | None:
    words = (digits.reshape(-1, 8) << _SHIFTS).sum(1)
    raw = (words[:, None] >> np.array([16, 8, 0]) & 255).astype(np.uint8).tobytes()
    fields = _LAYOUT.unpack(raw)
    return fields[:-1] if fields[-1] == zlib.crc32(raw[:-4]) else None
