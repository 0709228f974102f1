"""The active rank over the steps of a scheduler of diffusers, and as a picture."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from ..schedule import RankSchedule
from ..weights.files import read_json, replaced


@dataclass(frozen=True)
class Step:
    """One step of a generation.

    Args:
        timestep: The timestep that the denoiser sees, in its own unit.
        noise: Which share of time is noise: 1 at pure noise, 0 at the end.
        rank: The active ranks.
    """

    timestep: float
    noise: float
    rank: int


def load_scheduler(source: str | os.PathLike[str], shift: float | None = None) -> Any:
    """A scheduler by its class's name, with default values, or from a folder of diffusers.

    Args:
        source: The name of a class, or the folder of a pipeline or of its scheduler.
        shift: The shift of a flow-matching scheduler, in the place of its own or of one that
            depends on the size of the picture.

    Raises:
        ValueError: If diffusers has no such scheduler, or it has no such shift or can't have any.
    """
    folder, config = Path(source), {"_class_name": str(source)}
    if folder.is_dir():
        inner = folder / "scheduler"
        config = read_json((inner if inner.is_dir() else folder) / "scheduler_config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    cls: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ValueError(f"{source} is no scheduler of diffusers, nor a folder with one.")
    scheduler: Any = cls.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]
    if shift is not None and not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a finite number above 0, got {shift}.")
    if shift is None:
        if scheduler.config.get("use_dynamic_shifting"):
            raise ValueError(
                f"The shift of {source} depends on the size of the picture; pass one with --shift."
            )
        return scheduler
    name = next((n for n in ("shift", "flow_shift") if n in scheduler.config), None)
    if name is None:
        raise ValueError(f"{cls.__name__} has no shift; leave --shift out.")
    changes: dict[str, Any] = {name: shift}
    if scheduler.config.get("use_dynamic_shifting"):
        changes["use_dynamic_shifting"] = False
    return cls.from_config(config, **changes)  # pyright: ignore[reportAttributeAccessIssue]


def steps_of(schedule: RankSchedule, scheduler: Any, count: int) -> list[Step]:
    """The active rank at each of `count` steps of a scheduler."""
    scheduler.set_timesteps(count)
    total = float(scheduler.config.get("num_train_timesteps", 1000))
    steps = []
    for value in scheduler.timesteps.tolist():
        if schedule.timestep_type == "log_sigma":
            timestep = float(value)
            noise = schedule.noise_at(timestep)
        else:
            noise = value / total
            if scheduler.config.get("invert_sigmas"):
                noise = 1 - noise
            timestep = schedule.timestep_at(noise)
        steps.append(Step(timestep, noise, schedule.active_rank(timestep)))
    return steps


def transitions(schedule: RankSchedule, points: int = 10001) -> list[Step]:
    """The noises at which another rank is active, the noisiest first."""
    found: list[Step] = []
    for i in range(points):
        noise = 1 - i / (points - 1)
        timestep = schedule.timestep_at(noise)
        rank = schedule.active_rank(timestep)
        if not found or rank != found[-1].rank:
            found.append(Step(timestep, noise, rank))
    return found


def plot(
    path: str | os.PathLike[str], schedule: RankSchedule, steps: list[Step] | None = None
) -> None:
    """Draw the active rank over the noise, and the steps of a scheduler on it, as a PNG.

    Args:
        path: The file.
        schedule: The schedule.
        steps: Steps to mark.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("A plot needs matplotlib: pip install 'peft_tlora[plot]'.") from None
    changes = transitions(schedule)
    noises = [*(step.noise for step in changes), 0.0]
    ranks = [*(step.rank for step in changes), changes[-1].rank]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.step(noises, ranks, where="post", color="#c0392b")
    if steps:
        axes.plot([s.noise for s in steps], [s.rank for s in steps], "o", color="#2c3e50", ms=4)
    axes.set(
        title=f"{schedule.rank_schedule} schedule, {schedule.r_min} to {schedule.r} ranks",
        xlabel=f"share of noise, from timestep {schedule.timestep_at(1.0):g} to "
        f"{schedule.timestep_at(0.0):g}",
        ylabel="active ranks",
        xlim=(1, 0),
        ylim=(0, schedule.r * 1.05),
    )
    with replaced(Path(path)) as new:
        figure.savefig(new, format="png", dpi=120)
