"""What the values of timesteps tell: are they in range, are they 0.25 ln(sigma)."""

import torch
from torch import Tensor

from ..schedule import RankSchedule


class TimestepRange:
    """Watches the timesteps of one denoiser without making its forwards wait for the device.

    Args:
        name: Name of the denoiser's class, for messages.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self._seen_linear: Tensor | None = None
        self._seen_outside: Tensor | None = None
        self._only_fractions: Tensor | bool = True  # False for good, once it has been read
        self._checks = 0
        self._complained = False

    def looks_like_log_sigma(self, value: float | Tensor) -> Tensor:
        """Whether timesteps are 0.25 ln(sigma), a bool tensor of shape ().

        Those of EDM's schedulers are never whole and lie between -1.6 and 1.7, while all others
        pass 2 at their first, noisy steps. One value that says otherwise decides for good.
        """
        t = _tensor(value)
        linear = ((t.abs() >= 2) | (t == t.round())).any()
        self._seen_linear = _either(linear, self._seen_linear)
        return ~self._seen_linear

    def complaint(
        self, value: float | Tensor, schedule: RankSchedule, is_log_sigma: Tensor | None
    ) -> str | None:
        """What to warn of, once: timesteps that the schedule doesn't expect.

        They are gathered on their device and read after 1, 2, 4, ... forwards only.
        """
        if self._complained or _is_capturing():
            return None
        told = is_log_sigma if schedule.timestep_type is None else None
        outside = ~_tensor(schedule.allows(value)).all()
        self._seen_outside = _either(_either(outside, told), self._seen_outside)
        fractions = self._only_fractions  # other threads may call the model and change it meanwhile
        if schedule.timestep_type != "linear" or schedule.num_train_timesteps <= 2:
            fractions = False
        elif fractions is not False:
            t = _tensor(value)
            inside = ((t > 0) & (t < 1)).all()
            fractions = inside if fractions is True else inside & fractions.to(t.device)
        fractions = self._only_fractions is not False and fractions
        self._only_fractions = fractions
        self._checks += 1
        if self._checks & (self._checks - 1) != 0:
            return None
        self._only_fractions = fractions = bool(fractions)
        if not self._seen_outside and not fractions:
            return None
        self._complained = True
        if fractions:
            return (
                f"The timesteps of {self.name} are taken to count from 0 to "
                f"{schedule.num_train_timesteps:g}, but all so far lie between 0 and 1 (now: "
                f"{value}). If that is how they count, set num_train_timesteps=1 in the config, "
                "and timestep_reversed=True if 0 is pure noise: the mask is wrong without."
            )
        if told is not None and told:
            return (
                f"The timesteps of {self.name} look like 0.25 ln(sigma), as EDM's schedulers "
                "have it, and are taken for that. Set timestep_type='log_sigma' in the config if "
                "it's right, and 'linear' if not."
            )
        expected = f"between 0 and {schedule.num_train_timesteps:g}"
        if schedule.timestep_type == "log_sigma":
            expected = "0.25 ln(sigma)"
        return (
            f"{self.name} got timesteps that T-LoRA doesn't expect: they should be {expected}, "
            f"but not all of the latest are (now: {value}). The mask is wrong unless you set "
            "num_train_timesteps, timestep_reversed and timestep_type in the config as the "
            "scheduler has it, or give the timestep with peft_tlora.timestep_context."
        )


def _tensor(value: float | bool | Tensor) -> Tensor:
    """A tensor where it is, a number on the host."""
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


def _either(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one | other.to(one.device)


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
