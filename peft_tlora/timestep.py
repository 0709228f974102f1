"""The timestep of a forward, from where it is known to the layers that need it.

One `TimestepState` serves one denoiser. Its value is set by the denoiser's forward hook or by
`timestep_context` and lasts for that forward only.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .recomputation import Forward, ForwardLog
from .schedule import RankSchedule
from .timestep_range import TimestepRange


class CapturedTimestep:
    """The timestep of one forward: a number or a tensor of shape (), (batch,) or (batch, tokens).

    Args:
        value: The timestep.
        per_sample: Whether a tensor's values belong to the samples of the batch; if not, the
            noisiest stands for all of them.

    Raises:
        TypeError: If the value is neither a number nor a tensor.
        ValueError: If a number isn't finite.
    """

    def __init__(self, value: float | Tensor, per_sample: bool = True) -> None:
        if not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"A timestep must be a number or a tensor, got {value!r}.")
            if not math.isfinite(value):
                raise ValueError(f"A timestep must be finite, got {value}.")
        self._given = value
        self.per_sample = per_sample
        self.is_log_sigma: Tensor | None = None  # what the values tell, if they are to tell it
        self.checked = False
        self._active: dict[RankSchedule, int | Tensor] = {}
        self._largest: dict[RankSchedule, int | None] = {}
        self._shared: dict[Hashable, Tensor] = {}
        self._uniform: bool | None = None

    @property
    def value(self) -> float | Tensor:
        """The timestep as a number or of shape (), (batch,) or (batch, tokens), without a graph.

        It is brought into form where it is read: torch.compile would make a graph of the hook for
        what the hook does to tensors.
        """
        value = self._given
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        value = value.reshape(()) if value.numel() == 1 else value
        return value.flatten(1) if value.dim() > 2 else value

    def active_rank(self, schedule: RankSchedule) -> int | Tensor:
        """Active ranks of the timestep's shape, or of shape (); computed once a schedule."""
        if torch.compiler.is_compiling():
            return self._active_rank(schedule)
        if schedule not in self._active:
            self._active[schedule] = self._active_rank(schedule)
        return self._active[schedule]

    def largest_rank(self, schedule: RankSchedule) -> int | None:
        """The largest active rank; None if it lies on a device, or must not get into a graph."""
        if torch.compiler.is_compiling():
            return None
        if schedule not in self._largest:
            rank = self.active_rank(schedule)
            if isinstance(rank, Tensor):
                rank = int(rank.max()) if rank.device.type == "cpu" else None
            self._largest[schedule] = rank
        return self._largest[schedule]

    def shared(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, made once for each key in this forward."""
        if torch.compiler.is_compiling():
            return make()
        key = (key, torch.is_inference_mode_enabled())  # its tensors can't be used in training
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _active_rank(self, schedule: RankSchedule) -> int | Tensor:
        rank = schedule.active_rank(self.value)
        if schedule.timestep_type is None and self.is_log_sigma is not None:
            other = replace(schedule, timestep_type="log_sigma").active_rank(self.value)
            rank = torch.where(self.is_log_sigma, other, rank)
        if isinstance(rank, Tensor) and not self.per_sample:
            rank = rank.amin()
        return rank

    def is_uniform(self) -> bool:
        """Whether all samples share one timestep. Reads a device tensor: a last resort."""
        if self._uniform is None:
            t = self.value
            self._uniform = (
                not isinstance(t, Tensor)
                or not self.per_sample
                or bool((t == t.flatten()[0]).all())
            )
        return self._uniform


class TimestepState:
    """What the T-LoRA layers of one denoiser know of the current timestep.

    Args:
        denoiser: Name of the denoiser's class if its layers are expected to have a timestep; a
            forward without one then warns. None for models without time, such as text encoders.
        per_sample: See `CapturedTimestep`.
        detects_log_sigma: Whether the values must tell if timesteps are 0.25 ln(sigma).
    """

    def __init__(
        self, denoiser: str | None, *, per_sample: bool = True, detects_log_sigma: bool = False
    ) -> None:
        self.denoiser = denoiser
        self.per_sample = per_sample
        self.detects_log_sigma = detects_log_sigma
        self._range = TimestepRange(denoiser)
        self._log: ForwardLog[CapturedTimestep] = ForwardLog(denoiser)
        self._explicit: CapturedTimestep | None = None
        self._captured: CapturedTimestep | None = None
        self._running: Forward[CapturedTimestep] | None = None
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model start afresh: nothing of a running forward goes along."""
        return {
            "denoiser": self.denoiser,
            "per_sample": self.per_sample,
            "detects_log_sigma": self.detects_log_sigma,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what `__getstate__` kept."""
        self.__init__(**state)

    def capture(self, timestep: object) -> CapturedTimestep:
        """A timestep as this denoiser means it.

        Raises:
            TypeError: If it is neither a number nor a tensor.
            ValueError: If it is a number that isn't finite.
        """
        captured = CapturedTimestep(timestep, self.per_sample)  # pyright: ignore[reportArgumentType]
        if self.detects_log_sigma and not torch.compiler.is_compiling():
            captured.is_log_sigma = self._range.looks_like_log_sigma(captured.value)
        return captured

    def begin_forward(self, timestep: object) -> None:
        """Take the timestep of a denoiser's forward that starts now; None if it has none."""
        self._captured = None if timestep is None else self.capture(timestep)
        self._running = self._log.open(self._explicit or self._captured)

    def end_forward(self) -> None:
        """Forget the timestep of a forward that has ended, with or without an exception."""
        self._captured = None
        self._log.close(self._running)
        self._running = None

    @contextmanager
    def explicit(self, timestep: CapturedTimestep) -> Iterator[None]:
        """Set a timestep that wins over the captured one."""
        previous, self._explicit = self._explicit, timestep
        forward = self._log.open(timestep)
        try:
            yield
        finally:
            self._explicit = previous
            self._log.close(forward)

    def current(self) -> CapturedTimestep | None:
        """The timestep that applies to the layer that runs now, None if there is none."""
        timestep = self._log.value_of_recomputation() or self._explicit or self._captured
        if timestep is None and self.denoiser is not None:
            self.warn_once(
                "missing",
                f"A T-LoRA layer of {self.denoiser} ran without a timestep, so all of its ranks "
                "are active. Call the model itself, not its forward method, with the timestep as "
                "an argument, or set it with `with peft_tlora.timestep_context(model, timestep):`.",
            )
        return timestep

    def active_rank(self, timestep: CapturedTimestep, schedule: RankSchedule) -> int | Tensor:
        """Active ranks at a timestep; warns once of values that the schedule doesn't expect."""
        if not torch.compiler.is_compiling() and not timestep.checked:
            timestep.checked = True
            complaint = self._range.complaint(timestep.value, schedule, timestep.is_log_sigma)
            if complaint:
                warnings.warn(complaint, stacklevel=2)
        return timestep.active_rank(schedule)

    @property
    def context(self) -> CapturedTimestep | None:
        """The timestep of the surrounding `timestep_context`, None outside of one."""
        return self._explicit

    def warn_once(self, topic: str, message: str) -> None:
        """Warn of a topic the first time only."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=2)


class TimestepLayer:
    """A layer whose forward depends on a timestep; mixed into a module."""

    timestep_state: TimestepState | None = None


@contextmanager
def timestep_context(model: nn.Module, timestep: float | Tensor) -> Iterator[None]:
    """Set the timestep of all T-LoRA layers of a model for the forwards inside the context.

    It is needed only where the timestep doesn't reach the denoiser's forward as an argument, and to
    choose the mask that a merge bakes in. It wins over the timestep that the model is called with,
    and the previous one comes back at the end, also after an exception. Blocks recomputed in a
    later backward use it too.

    Args:
        model: Any module that holds T-LoRA layers: a denoiser, a PeftModel, a text encoder.
        timestep: Timestep in the unit of the denoiser's forward, a number or a tensor of shape (),
            (1,), (batch,) or (batch, tokens).

    Raises:
        TypeError: If `model` is not a module or `timestep` neither a number nor a tensor.
        ValueError: If the model has no T-LoRA layer, or a number is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"timestep_context needs a torch.nn.Module, got {type(model).__name__}; for a pipeline "
            "pass its denoiser, as in `timestep_context(pipe.unet, t)`."
        )
    states = {
        id(module.timestep_state): module.timestep_state
        for module in model.modules()
        if isinstance(module, TimestepLayer) and module.timestep_state is not None
    }
    if not states:
        raise ValueError(
            f"{type(model).__name__} has no T-LoRA layer; add an adapter with a TLoraConfig first."
        )
    with ExitStack() as stack:
        for state in states.values():
            stack.enter_context(state.explicit(state.capture(timestep)))
        yield
