"""The arms: what is trained, one entry each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from peft_tlora import TLoraConfig


@dataclass(frozen=True)
class Arm:
    """How the adapter is made, and the share of the noise levels at which it trains and acts.

    Args:
        title: Its name in tables and plots.
        config: Makes the adapter's config from (r, r_min) and the target modules.
        band: The lowest and highest timestep, as shares of the model's number of timesteps.
        reads_minimum: Whether r_min changes it.
    """

    title: str
    config: Callable[[int, int, list[str]], LoraConfig]
    band: tuple[float, float] = (0.0, 1.0)
    reads_minimum: bool = True


def _lora(rank: int, targets: list[str]) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)


def _tlora(rank: int, targets: list[str], **options: Any) -> TLoraConfig:
    return TLoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **options)


def _band(title: str, low: float, high: float) -> Arm:
    return Arm(title, lambda r, m, t: _lora(r, t), band=(low, high), reads_minimum=False)


ARMS = {
    "lora": Arm("LoRA r", lambda r, m, t: _lora(r, t), reads_minimum=False),
    "lora_mean": Arm("LoRA (r + r_min)/2", lambda r, m, t: _lora((r + m) // 2, t)),
    "lora_min": Arm("LoRA r_min", lambda r, m, t: _lora(m, t)),
    "vanilla": Arm("Vanilla T-LoRA", lambda r, m, t: _tlora(r, t, min_rank=m, ortho_init=None)),
    "ortho": Arm(
        "Ortho-LoRA",
        lambda r, m, t: _tlora(r, t, rank_schedule="constant"),
        reads_minimum=False,
    ),
    "tlora": Arm("T-LoRA", lambda r, m, t: _tlora(r, t, min_rank=m)),
    "reversed": Arm(
        "T-LoRA reversed", lambda r, m, t: _tlora(r, t, min_rank=m, timestep_reversed=True)
    ),
    "band_clean": _band("LoRA, cleanest third", 0.0, 1 / 3),
    "band_middle": _band("LoRA, middle third", 1 / 3, 2 / 3),
    "band_noisy": _band("LoRA, noisiest third", 2 / 3, 1.0),
}
BANDS = ("band_clean", "band_middle", "band_noisy")
CORE = tuple(name for name in ARMS if name not in BANDS)
BASE = "base"


def title(name: str) -> str:
    """What an arm is called in tables and plots."""
    return "base, no adapter" if name == BASE else ARMS[name].title
