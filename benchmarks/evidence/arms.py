"""The arms: what is trained, one entry each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from peft_tlora import TLoraConfig

Band = tuple[float, float]
ALL: Band = (0.0, 1.0)
THIRDS: dict[str, Band] = {"clean": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "noisy": (2 / 3, 1.0)}


@dataclass(frozen=True)
class Arm:
    """How the adapter is made, and the bands of timesteps in which it trains and acts.

    Args:
        title: Its name in tables and plots.
        config: Makes the adapter's config from (r, r_min) and the target modules.
        trains: The lowest and highest timestep of training, as shares of all.
        acts: The same in generation; outside, the base does without the adapter.
        reads_minimum: Whether r_min changes it.
    """

    title: str
    config: Callable[[int, int, list[str]], LoraConfig]
    trains: Band = ALL
    acts: Band = ALL
    reads_minimum: bool = True


def _lora(rank: int, targets: list[str]) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)


def _tlora(rank: int, targets: list[str], **options: Any) -> TLoraConfig:
    # a start of the trial's own, drawn after its seed was set
    return TLoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_seed=None, **options)


def _in_bands(title: str, trains: Band = ALL, acts: Band = ALL) -> Arm:
    return Arm(title, lambda r, m, t: _lora(r, t), trains, acts, reads_minimum=False)


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
}
CORE = tuple(ARMS)
BANDS = {
    **{f"band_{n}": _in_bands(f"LoRA, {n} third", b, b) for n, b in THIRDS.items()},
    **{f"trains_{n}": _in_bands(f"LoRA trained in the {n} third", b) for n, b in THIRDS.items()},
    **{f"acts_{n}": _in_bands(f"LoRA acting in the {n} third", acts=b) for n, b in THIRDS.items()},
}
ARMS |= BANDS
BASE = "base"


def title(name: str) -> str:
    """What an arm is called in tables and plots."""
    return "base, no adapter" if name == BASE else ARMS[name].title
