"""What a file may not say about its training, and how it is put together with what it says."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ..config import TLoraConfig
from ..schedule import RankSchedule, RankScheduleKind
from ..timestep.denoisers import Denoiser, describe


@dataclass(frozen=True)
class TrainingFacts:
    """Facts of a training that not every file has in it; None is unknown.

    Args:
        min_rank: Ranks active at pure noise, an int or a fraction of r.
        rank_schedule: "power", or "constant" for training without a mask.
        schedule_exponent: The paper's alpha.
        num_train_timesteps: The timestep of pure noise, in the unit of diffusers' denoiser.
        sig_type: Which singular triplets the factors started as: "principal", "last" or "middle".
        boundary_timestep: Takenoko's `tlora_boundary_timestep`.
    """

    min_rank: int | float | None = None
    rank_schedule: RankScheduleKind | None = None
    schedule_exponent: float | None = None
    num_train_timesteps: float | None = None
    sig_type: str | None = None
    boundary_timestep: int | None = None

    def known(self) -> list[str]:
        """The names of the facts that aren't None."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def joined(self, found: Mapping[str, Any], where: str) -> "TrainingFacts":
        """These facts and those found in a file.

        Raises:
            ValueError: If they contradict each other.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in found.items():
            if values[name] is not None and values[name] != value:
                raise ValueError(
                    f"{name}={values[name]!r} was given, but {where} says {value!r}; leave it out "
                    "to follow the file."
                )
            values[name] = value
        return TrainingFacts(**values)

    def require(self, *names: str, format: str) -> None:
        """Raise unless these facts are known.

        Raises:
            ValueError: With the names of those that aren't.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(
                f"{format} doesn't say {', '.join(missing)}: pass what the training used, as "
                f"TrainingFacts({', '.join(f'{name}=...' for name in missing)}) or {options}."
            )

    def schedule(self, r: int, format: str) -> RankSchedule:
        """The schedule of a layer of rank r.

        Raises:
            ValueError: If a fact that it needs is unknown.
        """
        self.require("rank_schedule", "num_train_timesteps", format=format)
        if self.rank_schedule == "constant":
            return RankSchedule(
                r, r, "constant", num_train_timesteps=float(self.num_train_timesteps or 0)
            )
        self.require("min_rank", "schedule_exponent", format=format)
        return RankSchedule(
            r,
            min_rank=self.min_rank,  # pyright: ignore[reportArgumentType]
            rank_schedule=self.rank_schedule,  # pyright: ignore[reportArgumentType]
            schedule_exponent=float(self.schedule_exponent or 0),
            num_train_timesteps=float(self.num_train_timesteps or 0),
        )


@dataclass(frozen=True)
class Given:
    """What is given beside a file, for its reader; the arguments of `read_adapter`."""

    facts: TrainingFacts = TrainingFacts()
    base: nn.Module | None = None
    component: str | None = None
    hparams: str | os.PathLike[str] | None = None
    config: TLoraConfig | None = None

    def names(self) -> list[str]:
        """The names of what isn't None, of facts each."""
        others = (f.name for f in fields(self) if f.name != "facts")
        return self.facts.known() + [name for name in others if getattr(self, name) is not None]


def in_unit_of(base: nn.Module, schedule: RankSchedule) -> RankSchedule:
    """The schedule of a model, which may count its time backwards.

    Raises:
        ValueError: If the model counts it in another unit.
    """
    denoiser = describe(base) or Denoiser(num_train_timesteps=schedule.num_train_timesteps)
    if (denoiser.num_train_timesteps > 1) != (schedule.num_train_timesteps > 1):
        raise ValueError(
            f"num_train_timesteps={schedule.num_train_timesteps:g} is not in the unit of "
            f"{type(base).__name__}, whose timesteps go to {denoiser.num_train_timesteps:g} in "
            f"diffusers: pass {denoiser.num_train_timesteps:g} (--num-train-timesteps)."
        )
    return replace(schedule, timestep_reversed=denoiser.timestep_reversed)


def number(value: Any, name: str, where: str, kind: type[int] | type[float] = float) -> Any:
    """A number from a file's text.

    Raises:
        ValueError: If it is none.
    """
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where} says {name}={str(value)[:80]!r}, which is no number.") from None
