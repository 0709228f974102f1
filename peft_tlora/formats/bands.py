"""A T-LoRA as K plain LoRAs, each the exact mask of one timestep in its band of timesteps."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..schedule import SCHEDULE_FIELDS, RankSchedule
from ..weights.files import read_json, replaced_together, write_json
from .adapter import Adapter
from .lora import write_lora
from .plain import plain_lora
from .sampling import Sampling, sampling_of
from .workflow import workflow

_MOST = 1000
_BANDS, _WORKFLOW = "bands.json", "workflow.json"


@dataclass(frozen=True)
class Band:
    """A range of noise levels with one mask; the noisiest band is the first.

    The noise is t / T, the share of time that is noise: 1 at pure noise, 0 at the end.

    Args:
        noise: The noisiest and the cleanest noise of the band.
        mask_noise: The noise whose mask the band has.
    """

    noise: tuple[float, float]
    mask_noise: float


def split_bands(schedule: RankSchedule, count: int) -> list[Band]:
    """Divide time into bands in which the same number of ranks switch on.

    With `count` = r - r_min bands (each group of `rank_multiple` ranks one) the masks are exact, up
    to the one timestep 0, whose last rank is missing.

    Args:
        schedule: The schedule.
        count: The number of bands; 1 for a constant schedule, whose mask never changes.

    Raises:
        ValueError: If it is below 1, or above any use.
    """
    if not 1 <= count <= _MOST:
        raise ValueError(f"The number of bands must lie in [1, {_MOST}], got {count}.")
    if schedule.rank_schedule == "constant":
        return [Band((1.0, 0.0), 0.0)]
    edges = [schedule.noise_with(i / count) for i in range(count + 1)]
    middles = [schedule.noise_with((i + 0.5) / count) for i in range(count)]
    return [Band((edges[i], edges[i + 1]), middle) for i, middle in enumerate(middles)]


def write_bands(
    adapter: Adapter,
    destination: str | os.PathLike[str],
    *,
    count: int,
    to: str = "comfyui",
    family: str | None = None,
    shift: float | None = None,
    sigma_range: tuple[float, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write K plain LoRAs, bands.json with the range of each, and workflow.json for ComfyUI.

    A tool that knows nothing of T-LoRA switches them one after the other. With one band it is the
    plain export of the middle mask. Where the sampling can't be told, which is for a transformer of
    no known family without a shift, bands.json has timesteps only and there is no workflow.json.

    All files are written whole before any takes the place of an old one. The band files that an old
    bands.json lists and this export hasn't are removed; other files in the folder stay.

    Args:
        adapter: The adapter.
        destination: The folder.
        count: The number of bands.
        to: Names in the files: "lora", "kohya" or "comfyui".
        family: Family of the base model, for the last two.
        shift: The shift of a flow model's sampler (e ** 1.15 for FLUX's default).
        sigma_range: The smallest and largest sigma of the sampler, for timesteps of 0.25 ln(sigma).
        dtype: The dtype of the tensors.

    Returns:
        The folder.

    Raises:
        ValueError: If the layers' schedules differ in more than the rank, the count is below 1, or
            the sampling of the base model is to be told.
    """
    schedule = _one_schedule(adapter)
    sampling = sampling_of(
        schedule, adapter.component, family, shift=shift, sigma_range=sigma_range
    )
    if sigma_range is not None:
        schedule = replace(schedule, timestep_type="log_sigma")
        adapter = _with_log_sigma(adapter)
    folder = Path(destination)
    before = _listed(folder / _BANDS)
    bands = []
    with replaced_together(folder, _BANDS, _WORKFLOW) as new:
        for number, band in enumerate(split_bands(schedule, count)):
            timestep = schedule.timestep_at(band.mask_noise)
            lora = plain_lora(adapter, timestep=timestep, dtype=dtype)
            name = f"{_prefix(folder)}{number:02}.safetensors"
            path = write_lora(lora, new / name, to, family=family)
            bands.append(_described(path.name, band, schedule, sampling))
        about = None if sampling is None else sampling.described()
        write_json(new / _BANDS, {"version": 1, "sampling": about, "bands": bands})
        if sampling is not None:
            write_json(new / _WORKFLOW, workflow(bands))
    for name in before - {band["file"] for band in bands}:
        (folder / name).unlink(missing_ok=True)
    return folder


def _prefix(folder: Path) -> str:
    """How band files begin: with the folder's name, as other programs gather all in one place."""
    return f"{folder.resolve().name}_"


def _listed(path: Path) -> set[str]:
    """The band files in an earlier export's list, none if there is no such list."""
    try:
        files = [band["file"] for band in read_json(path)["bands"]]
        ours = re.compile(re.escape(_prefix(path.parent)) + r"\d\d+\.safetensors")
        return {name for name in files if ours.fullmatch(name)}
    except (KeyError, TypeError, ValueError):
        return set()


def _with_log_sigma(adapter: Adapter) -> Adapter:
    """The adapter with a timestep of 0.25 ln(sigma), where the scheduler was to decide."""
    layers = {
        name: replace(layer, schedule=replace(layer.schedule, timestep_type="log_sigma"))
        for name, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def _described(
    file: str, band: Band, schedule: RankSchedule, sampling: Sampling | None
) -> dict[str, Any]:
    """The entry of a band in bands.json; the ranges go from noisy to clean."""
    ranges = {"timestep": [schedule.timestep_at(noise) for noise in band.noise]}
    if sampling is not None:
        ranges["percent"] = [0.0 if noise == 1 else sampling.percent(noise) for noise in band.noise]
        ranges["sigma"] = [sampling.sigma(noise) for noise in band.noise]
    mask = schedule.timestep_at(band.mask_noise)
    return {"file": file, **ranges, "mask_timestep": mask, "rank": schedule.active_rank(mask)}


def _one_schedule(adapter: Adapter) -> RankSchedule:
    """The schedule of the layers, the one with the largest rank if that differs."""
    schedules = sorted({layer.schedule for layer in adapter.layers.values()}, key=lambda s: s.r)
    of_ranks = ("min_rank", "rank_multiple")
    fields = {
        tuple(getattr(s, name) for name in SCHEDULE_FIELDS if name not in of_ranks)
        for s in schedules
    }
    if len(fields) > 1:
        raise ValueError("The layers have different schedules, so they have no common bands.")
    return schedules[-1]
