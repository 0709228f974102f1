"""A schedule as a tensor that travels with the weights, so that a file describes itself."""

import struct

import torch
from torch import Tensor

from .frozen import Recipe
from .orthogonal import ORTHO_INITS
from .schedule import RANK_SCHEDULES, TIMESTEP_TYPES, RankSchedule

_VERSION = 1
_LENGTH = 14


def encode_schedule(
    schedule: RankSchedule, lora_alpha: float, use_rslora: bool, recipe: Recipe | None = None
) -> Tensor:
    """Write a schedule, LoRA's scaling and a recipe into an int64 tensor of shape (14,).

    Such a tensor travels with the weights, so that a file without config and metadata describes
    itself. Floats are kept as the bits of their float64, because hosts cast floating-point tensors
    to the model's dtype but leave integers alone. Layout: version, kind (index in
    `RANK_SCHEDULES`), exponent, min_rank, whether min_rank is a fraction, num_train_timesteps,
    timestep_reversed, lora_alpha, use_rslora, timestep_type (index in `TIMESTEP_TYPES`, or
    -1 for None), rank_multiple, and of the recipe of frozen factors that the file leaves out: the
    choice (index in `ORTHO_INITS`, or -1 without a recipe), seed and checksum.
    """
    timestep_type = schedule.timestep_type
    return torch.tensor(
        [
            _VERSION,
            RANK_SCHEDULES.index(schedule.kind),
            _float_to_bits(schedule.exponent),
            _float_to_bits(schedule.min_rank),
            isinstance(schedule.min_rank, float),
            _float_to_bits(schedule.num_train_timesteps),
            schedule.timestep_reversed,
            _float_to_bits(lora_alpha),
            use_rslora,
            -1 if timestep_type is None else TIMESTEP_TYPES.index(timestep_type),
            schedule.rank_multiple,
            -1 if recipe is None else ORTHO_INITS.index(recipe.choice),
            0 if recipe is None else recipe.seed,
            0 if recipe is None else recipe.checksum,
        ],
        dtype=torch.int64,
    )


def decode_schedule(encoded: Tensor, r: int) -> tuple[RankSchedule, float, bool]:
    """Inverse of `encode_schedule`: the schedule of a layer of rank `r`, lora_alpha, use_rslora.

    Raises:
        ValueError: If the tensor isn't a schedule of a known version.
    """
    known = encoded.dtype == torch.int64 and encoded.shape == (_LENGTH,)
    values = encoded.tolist() if known else [0]
    if (
        values[0] != _VERSION
        or not 0 <= values[1] < len(RANK_SCHEDULES)
        or not -1 <= values[9] < len(TIMESTEP_TYPES)
        or values[10] < 1
        or not -1 <= values[11] < len(ORTHO_INITS)
        or not (values[4] or _bits_to_float(values[3]).is_integer())
    ):
        raise ValueError(
            f"lora_schedule must be an int64 tensor of shape ({_LENGTH},) with version "
            f"{_VERSION} in front, got {encoded.dtype} of shape {tuple(encoded.shape)}: "
            f"{encoded}. The file is damaged or was written by a newer peft_tlora."
        )
    _, kind, exponent, min_rank, is_fraction, total, is_reversed = values[:7]
    lora_alpha, use_rslora, type_, multiple = values[7:11]
    minimum = _bits_to_float(min_rank)
    schedule = RankSchedule(
        r=r,
        min_rank=minimum if is_fraction else int(minimum),
        kind=RANK_SCHEDULES[kind],  # pyright: ignore[reportArgumentType]
        exponent=_bits_to_float(exponent),
        num_train_timesteps=_bits_to_float(total),
        timestep_reversed=bool(is_reversed),
        timestep_type=None if type_ == -1 else TIMESTEP_TYPES[type_],  # pyright: ignore[reportArgumentType]
        rank_multiple=multiple,
    )
    return schedule, _bits_to_float(lora_alpha), bool(use_rslora)


def decode_recipe(encoded: Tensor) -> Recipe | None:
    """The recipe in a tensor that `decode_schedule` takes; None if the file has the factors."""
    choice, seed, checksum = encoded.tolist()[11:]
    return None if choice == -1 else Recipe(ORTHO_INITS[choice], seed, checksum)  # pyright: ignore[reportArgumentType]


def _float_to_bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _bits_to_float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
