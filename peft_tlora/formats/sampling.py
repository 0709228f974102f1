"""Noise levels as ComfyUI counts them: sigmas, and percents of the sampling."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

from ..schedule import RankSchedule

_EDGE = 1e-6  # rounding of an edge that is a whole timestep


class Sampling(Protocol):
    """How noise, the share of time from 1 at pure noise to 0, is a sigma and a percent."""

    def sigma(self, noise: float) -> float:
        """The sigma at a noise."""
        ...

    def percent(self, noise: float) -> float:
        """ComfyUI's percent at which a band begins that has its first timestep at this noise."""
        ...

    def described(self) -> dict[str, Any]:
        """What it assumes, for a JSON file."""
        ...


@dataclass(frozen=True)
class FlowSampling:
    """Of a flow model, whose sigma is the noise; percents are counted before the sampler's shift.

    Args:
        shift: The shift s of sigma = s x / (1 + (s - 1) x) at x = 1 - percent.
    """

    shift: float

    def sigma(self, noise: float) -> float:
        """The noise."""
        return noise

    def percent(self, noise: float) -> float:
        """1 - x."""
        return 1 - noise / (self.shift - (self.shift - 1) * noise)

    def described(self) -> dict[str, Any]:
        """The shift."""
        return {"kind": "flow", **asdict(self)}


@dataclass(frozen=True)
class BetaSampling:
    """Of a model with betas, sigma = sqrt((1 - a) / a) with a the product of all 1 - beta up to t.

    Its timesteps are the integers from 0 to 999 here. A band's edge lies half a timestep above its
    first one, where a program begins to round a sigma to it. ComfyUI interpolates ln(sigma) between
    timesteps and takes a percent p for the timestep 999 (1 - p).

    Args:
        beta_start: Beta at timestep 0.
        beta_end: Beta at timestep 999; sqrt(beta) is linear in between ("scaled_linear").
        steps: The number of timesteps.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000

    @cached_property
    def _log_sigmas(self) -> list[float]:
        found, product = [], 1.0
        first, last = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        for i in range(self.steps):
            product *= 1 - (first + (last - first) * i / (self.steps - 1)) ** 2
            found.append(math.log((1 - product) / product) / 2)
        return found

    def _edge(self, noise: float) -> float:
        """The edge as a timestep of ComfyUI."""
        return min(math.floor(noise * self.steps + _EDGE) + 0.5, self.steps - 1)

    def sigma(self, noise: float) -> float:
        """The sigma, 0 at the end."""
        if noise == 0:
            return 0.0
        low, share = divmod(self._edge(noise), 1)
        first, second = (self._log_sigmas[i] for i in (int(low), min(int(low) + 1, self.steps - 1)))
        return math.exp((1 - share) * first + share * second)

    def percent(self, noise: float) -> float:
        """1 at the end."""
        return 1.0 if noise == 0 else 1 - self._edge(noise) / (self.steps - 1)

    def described(self) -> dict[str, Any]:
        """The betas, which no T-LoRA file says."""
        return {"kind": "betas", "assumed": True, "schedule": "scaled_linear", **asdict(self)}


@dataclass(frozen=True)
class EDMSampling:
    """Of an EDM model; ComfyUI's percent is linear in ln(sigma).

    Args:
        sigma_min: The sampler's smallest sigma.
        sigma_max: Its largest sigma.
    """

    sigma_min: float
    sigma_max: float

    def sigma(self, noise: float) -> float:
        """Noise / (1 - noise) within the sampler's range, 0 at the end."""
        if noise == 0:
            return 0.0
        inside = self.sigma_max if noise == 1 else noise / (1 - noise)
        return min(max(inside, self.sigma_min), self.sigma_max)

    def percent(self, noise: float) -> float:
        """1 at the end."""
        if noise == 0:
            return 1.0
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return (high - math.log(self.sigma(noise))) / (high - low)

    def described(self) -> dict[str, Any]:
        """The range of sigmas."""
        return {"kind": "edm", **asdict(self)}


def sampling_of(
    schedule: RankSchedule,
    component: str,
    family: str | None,
    *,
    shift: float | None,
    sigma_range: tuple[float, float] | None,
) -> Sampling | None:
    """How the base model of an adapter is sampled; None if that can't be told.

    Args:
        schedule: The adapter's schedule.
        component: "unet", which is taken to have Stable Diffusion's betas, or another.
        family: The family of the base model, if known.
        shift: The shift of a flow model's sampler.
        sigma_range: The smallest and the largest sigma of an EDM model's sampler.

    Raises:
        ValueError: If one of the last two is needed, out of range, or contradicts the rest.
    """
    log_sigma = schedule.timestep_type == "log_sigma"
    if shift is not None and (log_sigma or sigma_range is not None):
        raise ValueError("A shift is for flow models, whose timesteps aren't logarithms of sigma.")
    if shift is not None:
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift must be a finite number above 0, got {shift}.")
        return FlowSampling(shift)
    if sigma_range is not None:
        low, high = sigma_range
        if schedule.timestep_type == "linear" or not 0 < low < high < math.inf:
            raise ValueError(
                "sigma_range is for models whose timestep is 0.25 ln(sigma), and must be two "
                f"numbers with 0 < smallest < largest, got {sigma_range}, timestep_type="
                f"{schedule.timestep_type!r}."
            )
        return EDMSampling(low, high)
    if log_sigma:
        raise ValueError(
            "The timesteps are 0.25 ln(sigma) (timestep_type='log_sigma'), so the percents depend "
            "on the sampler's range of sigmas: pass sigma_range=(smallest, largest) "
            "(--sigma-range SMALLEST LARGEST), such as 0.002 80."
        )
    if family in ("sd3", "flux", "wan"):
        raise ValueError(
            f"{family} is a flow model, so the percents depend on its sampler's shift: pass "
            "shift=... (--shift), 1 for none."
        )
    return BetaSampling() if component == "unet" else None
