"""Timestep -> active rank -> mask: the rank schedule of T-LoRA as pure functions of tensors."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, overload

import torch
from torch import Tensor

RankScheduleKind = Literal["power", "cosine", "constant"]
RANK_SCHEDULES: tuple[str, ...] = get_args(RankScheduleKind)
TimestepType = Literal["linear", "log_sigma"]
TIMESTEP_TYPES: tuple[str, ...] = get_args(TimestepType)

# what float32 loses of a timestep that was divided before: 800 / 1000 must count as 0.8
_ROUNDING = 2.0**-22
_LOG_SIGMA_RANGE = (-4.0, 4.0)  # sigma from 1e-7 to 9e6


@dataclass(frozen=True)
class RankSchedule:
    """How many of a layer's ranks are active at each timestep.

    Args:
        r: The layer's rank.
        min_rank: These are the fields of `TLoraConfig`, of which those that may be None there are
            what the model's class says. `timestep_type` is None for linear time whose values may
            turn out to be 0.25 ln(sigma).

    Raises:
        ValueError: If a value is out of its range or no choice.
        TypeError: If a value has the wrong type.
    """

    r: int
    min_rank: int | float = 0.5
    rank_schedule: RankScheduleKind = "power"
    schedule_exponent: float = 1.0
    num_train_timesteps: float = 1000.0
    timestep_reversed: bool = False
    timestep_type: TimestepType | None = "linear"
    rank_multiple: int = 1

    def __post_init__(self) -> None:
        """Check every field, as some come from files."""
        check_rank(self.r, "r")
        check_min_rank(self.min_rank, self.r)
        check_multiple(self.rank_multiple, self.r, self.min_rank)
        check_choice(self.rank_schedule, RANK_SCHEDULES, "rank_schedule")
        check_positive(self.schedule_exponent, "schedule_exponent")
        check_positive(self.num_train_timesteps, "num_train_timesteps")
        if self.timestep_type is not None:
            check_choice(self.timestep_type, TIMESTEP_TYPES, "timestep_type (if not None)")

    @property
    def r_min(self) -> int:
        """The rank at pure noise; a fraction is rounded down, but to at least `rank_multiple`."""
        if isinstance(self.min_rank, int):
            return self.min_rank
        return max(1, int(self.min_rank * (self.r // self.rank_multiple))) * self.rank_multiple

    @overload
    def active_rank(self, timestep: float) -> int: ...
    @overload
    def active_rank(self, timestep: Tensor) -> Tensor: ...
    def active_rank(self, timestep: float | Tensor) -> int | Tensor:
        """The active rank r(t); see `peft_tlora.active_rank`."""
        if isinstance(timestep, Tensor):
            return self._active_rank_tensor(timestep)
        t = torch.tensor(float(timestep), dtype=torch.float64, device="cpu")
        return int(self._active_rank_tensor(t))

    def allows(self, timestep: float | Tensor) -> bool | Tensor:
        """Whether a timestep, or each of a tensor, lies in the range that the schedule expects.

        A step more at both ends is allowed, since schedulers start at 1 or end at -1.
        """
        low, high = 0.0, self.num_train_timesteps
        margin = 0.002 * self.num_train_timesteps
        if self.timestep_type == "log_sigma":
            (low, high), margin = _LOG_SIGMA_RANGE, 0.0
        return (timestep >= low - margin) & (timestep <= high + margin)

    @overload
    def noise_at(self, timestep: float) -> float: ...
    @overload
    def noise_at(self, timestep: Tensor) -> Tensor: ...
    def noise_at(self, timestep: float | Tensor) -> float | Tensor:
        """The share of time that is noise at a timestep: 1 at pure noise, 0 at the end."""
        if not isinstance(timestep, Tensor):
            return float(self.noise_at(torch.tensor(timestep, dtype=torch.float64, device="cpu")))
        if self.timestep_type == "log_sigma":
            return torch.sigmoid(4 * timestep)  # share of noise in x0 + sigma noise
        share = timestep.clamp(0.0, self.num_train_timesteps) / self.num_train_timesteps
        return 1 - share if self.timestep_reversed else share

    def timestep_at(self, noise: float) -> float:
        """The timestep of a share of noise, in the unit of the model; inverse of `noise_at`."""
        if self.timestep_type == "log_sigma":
            inside = min(max(noise, 2e-7), 1 - 2e-7)
            return math.log(inside / (1 - inside)) / 4
        return (1 - noise if self.timestep_reversed else noise) * self.num_train_timesteps

    def noise_with(self, share: float) -> float:
        """The noise at which a share of the varying ranks is active, if the schedule has any."""
        share = share ** (1 / self.schedule_exponent)
        return math.acos(2 * share - 1) / math.pi if self.rank_schedule == "cosine" else 1 - share

    def _active_rank_tensor(self, timestep: Tensor) -> Tensor:
        # fp32 would put the floor one rank off where the product is a whole number; mps has no fp64
        wide = torch.float32 if timestep.device.type == "mps" else torch.float64
        noise = self.noise_at(timestep.to(wide))
        match self.rank_schedule:
            case "constant":
                return torch.full_like(noise, self.r, dtype=torch.long)
            case "cosine":
                clean = (1 + torch.cos(math.pi * noise)) / 2
            case "power":
                clean = 1 - noise
        multiple = self.rank_multiple
        varying = (self.r - self.r_min) // multiple
        share = clean**self.schedule_exponent + _ROUNDING
        return torch.floor(share * varying).long() * multiple + self.r_min


# what a config, a file and a schedule say alike
SCHEDULE_FIELDS = tuple(field.name for field in fields(RankSchedule) if field.name != "r")


@overload
def active_rank(
    timestep: float,
    r: int,
    min_rank: int | float = ...,
    *,
    rank_schedule: RankScheduleKind = ...,
    schedule_exponent: float = ...,
    num_train_timesteps: float = ...,
    timestep_reversed: bool = ...,
    timestep_type: TimestepType = ...,
    rank_multiple: int = ...,
) -> int: ...
@overload
def active_rank(
    timestep: Tensor,
    r: int,
    min_rank: int | float = ...,
    *,
    rank_schedule: RankScheduleKind = ...,
    schedule_exponent: float = ...,
    num_train_timesteps: float = ...,
    timestep_reversed: bool = ...,
    timestep_type: TimestepType = ...,
    rank_multiple: int = ...,
) -> Tensor: ...
def active_rank(
    timestep: float | Tensor,
    r: int,
    min_rank: int | float = 0.5,
    *,
    rank_schedule: RankScheduleKind = "power",
    schedule_exponent: float = 1.0,
    num_train_timesteps: float = 1000.0,
    timestep_reversed: bool = False,
    timestep_type: TimestepType = "linear",
    rank_multiple: int = 1,
) -> int | Tensor:
    """The number of ranks that T-LoRA keeps active at a timestep.

    `r(t) = floor(((T - t) / T) ** alpha * (r - r_min)) + r_min`, the rank schedule of T-LoRA
    (arXiv 2507.05964), evaluated in float64. A share of ranks that is below a whole number by no
    more than float32's rounding of the timestep, 2.4e-7 of r - r_min, counts as that number.

    Args:
        timestep: Timestep in the model's own unit, a number or a tensor of any shape; values
            outside [0, T] are clamped.
        r: Rank of the layer, at least 1.
        min_rank: r_min: an int in [0, r], or a float in [0, 1], a fraction of `r` rounded down, but
            to at least 1.
        rank_schedule: "power" as above; "cosine" puts `(1 + cos(pi t / T)) / 2` in the place of
            `(T - t) / T`; "constant" is `r` at every timestep.
        schedule_exponent: The paper's alpha, above 0.
        num_train_timesteps: T, the timestep that means pure noise, above 0.
        timestep_reversed: Whether 0 is pure noise and T is clean.
        timestep_type: "log_sigma" if `timestep` is 0.25 ln(sigma), as EDM's schedulers have it:
            then sigma / (1 + sigma) takes the place of t / T, whatever T and the direction.
        rank_multiple: Ranks that switch on together: the formula counts groups of so many ranks,
            which must divide `r` and an int `min_rank`.

    Returns:
        An int for a number; for a tensor an int64 tensor of the same shape on the same device.

    Raises:
        ValueError: If a value is out of its range or `rank_schedule` is unknown.
        TypeError: If a value has the wrong type.
    """
    if not isinstance(timestep, Tensor) and not math.isfinite(timestep):
        raise ValueError(f"timestep must be a finite number, got {timestep}.")
    schedule = RankSchedule(
        r,
        min_rank,
        rank_schedule,
        schedule_exponent,
        num_train_timesteps,
        timestep_reversed,
        timestep_type,
        rank_multiple,
    )
    return schedule.active_rank(timestep)


def rank_mask(active: int | Tensor, r: int, device: torch.device) -> Tensor:
    """The mask m(t): for active ranks of shape (...) a bool tensor of shape (..., r)."""
    positions = torch.arange(r, device=device)
    if isinstance(active, Tensor):
        return positions < active.to(device, non_blocking=True).unsqueeze(-1)
    return positions < active


def check_rank(value: object, name: str) -> None:
    """Raise unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def check_min_rank(min_rank: object, r: int, where: str = "r") -> None:
    """Raise unless `min_rank` is an int in [0, r] or a float in [0, 1]."""
    if isinstance(min_rank, bool) or not isinstance(min_rank, (int, float)):
        raise TypeError(
            f"min_rank must be an int (a rank) or a float (a fraction of r), got {min_rank!r}."
        )
    if isinstance(min_rank, int) and not 0 <= min_rank <= r:
        raise ValueError(
            f"min_rank={min_rank} is a number of ranks and must lie in [0, {r}] for {where}={r}; "
            "pass a float in [0, 1] to give a fraction of each layer's own r."
        )
    if isinstance(min_rank, float) and not 0 <= min_rank <= 1:
        raise ValueError(
            f"min_rank={min_rank} is a fraction of r and must lie in [0, 1]; "
            "pass an int to give a number of ranks."
        )


def check_multiple(rank_multiple: object, r: int, min_rank: float, where: str = "r") -> None:
    """Raise unless `rank_multiple` is an int of at least 1 that divides r and an int min_rank."""
    check_rank(rank_multiple, "rank_multiple")
    divided = {where: r} | ({"min_rank": min_rank} if isinstance(min_rank, int) else {})
    for name, value in divided.items():
        if value % rank_multiple:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(
                f"{name}={value} must be a multiple of rank_multiple={rank_multiple}, the number "
                "of ranks that switch on together."
            )


def check_choice(value: object, choices: tuple[str, ...], name: str) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")


def check_positive(value: object, name: str) -> None:
    """Raise unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value}.")
