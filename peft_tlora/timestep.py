"""The timestep of a forward, from where it is known to the layers that need it.

One `TimestepState` serves one denoiser. Its value is set by the denoiser's forward hook or by
`timestep_context` and lasts for that forward only. A block under gradient checkpointing runs once
more during backward, when the value is gone or belongs to another forward; the state then finds the
forward that the recomputed block belongs to: each forward owns the autograd nodes whose sequence
numbers were handed out while it ran, and the node that triggers a recomputation is one of them.
This holds for every checkpointing function, reentrant or not.
"""

import math
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .schedule import RankSchedule

# forwards whose backward may still come; each costs one small tensor
_MAX_PENDING_FORWARDS = 4096


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
        if isinstance(value, Tensor):
            value = value.detach()
            value = value.reshape(()) if value.numel() == 1 else value
            value = value.flatten(1) if value.dim() > 2 else value
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"A timestep must be a number or a tensor, got {value!r}.")
        elif not math.isfinite(value):
            raise ValueError(f"A timestep must be finite, got {value}.")
        self.value = value
        self.per_sample = per_sample
        self.is_log_sigma: Tensor | None = None  # what the values tell, if they are to tell it
        self.checked = False
        self._active: dict[RankSchedule, int | Tensor] = {}
        self._uniform: bool | None = None

    def active_rank(self, schedule: RankSchedule) -> int | Tensor:
        """Active ranks of the timestep's shape, or of shape (); computed once a schedule."""
        if torch.compiler.is_compiling():
            return self._active_rank(schedule)
        if schedule not in self._active:
            self._active[schedule] = self._active_rank(schedule)
        return self._active[schedule]

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


class _Forward:
    """A forward that may be recomputed: the autograd sequence numbers it used, its timestep."""

    def __init__(self, timestep: CapturedTimestep | None) -> None:
        self.timestep = timestep
        self.thread = threading.get_ident()  # each thread counts for itself
        self.first = _next_sequence_number()
        self.end: int | None = None

    def owns(self, sequence_number: int) -> bool:
        return self.first <= sequence_number and (self.end is None or sequence_number < self.end)


class TimestepState:
    """What the T-LoRA layers of one denoiser know of the current timestep.

    Args:
        denoiser: Name of the denoiser's class if its layers are expected to have a timestep; a
            forward without one then warns. None for models without time, such as text encoders.
        per_sample: See `CapturedTimestep`.
        detects_log_sigma: Whether timesteps may be 0.25 ln(sigma), as those of EDM's schedulers
            are: never whole and between -1.6 and 1.7, while all others soon pass 2.
    """

    def __init__(
        self, denoiser: str | None, *, per_sample: bool = True, detects_log_sigma: bool = False
    ) -> None:
        self.denoiser = denoiser
        self.per_sample = per_sample
        self.detects_log_sigma = detects_log_sigma
        self._seen_linear: Tensor | None = None
        self._seen_outside: Tensor | None = None
        self._checks = 0
        self._explicit: CapturedTimestep | None = None
        self._captured: CapturedTimestep | None = None
        self._running: _Forward | None = None
        self._forwards: deque[_Forward] = deque(maxlen=_MAX_PENDING_FORWARDS)
        self._recomputed: _Forward | None = None
        self._last_number = 0
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
            captured.is_log_sigma = self._detect_log_sigma(captured.value)
        return captured

    def begin_forward(self, timestep: object) -> None:
        """Take the timestep of a denoiser's forward that starts now; None if it has none."""
        self._captured = None if timestep is None else self.capture(timestep)
        self._running = self._record()

    def end_forward(self) -> None:
        """Forget the timestep of a forward that has ended, with or without an exception."""
        self._captured = None
        self._close(self._running)
        self._running = None

    @contextmanager
    def explicit(self, timestep: CapturedTimestep) -> Iterator[None]:
        """Set a timestep that wins over the captured one."""
        previous, self._explicit = self._explicit, timestep
        forward = self._record()
        try:
            yield
        finally:
            self._explicit = previous
            self._close(forward)

    def current(self) -> CapturedTimestep | None:
        """The timestep that applies to the layer that runs now, None if there is none."""
        timestep = self._of_recomputation() or self._explicit or self._captured
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
        if not (timestep.checked or torch.compiler.is_compiling()):
            timestep.checked = True
            self._check(timestep, schedule)
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

    def _detect_log_sigma(self, value: float | Tensor) -> Tensor:
        t = torch.as_tensor(value)
        linear = ((t.abs() >= 2) | (t == t.round())).any()
        if self._seen_linear is not None:
            linear = linear | self._seen_linear.to(linear.device)
        self._seen_linear = linear
        return ~linear

    def _check(self, timestep: CapturedTimestep, schedule: RankSchedule) -> None:
        """Warn of values out of range. They are read after 1, 2, 4, ... forwards only.

        In between they are gathered on their device, so that a forward doesn't wait for it.
        """
        if "range" in self._warned or _is_capturing():
            return
        outside = ~torch.as_tensor(schedule.allows(timestep.value)).all()
        if schedule.timestep_type is None and timestep.is_log_sigma is not None:
            outside = outside | timestep.is_log_sigma
        if self._seen_outside is not None:
            outside = outside | self._seen_outside.to(outside.device)
        self._seen_outside = outside
        self._checks += 1
        if self._checks & (self._checks - 1) == 0 and outside:
            self.warn_once("range", self._describe_range(timestep, schedule))

    def _describe_range(self, timestep: CapturedTimestep, schedule: RankSchedule) -> str:
        if schedule.timestep_type is None and timestep.is_log_sigma:
            return (
                f"The timesteps of {self.denoiser} look like 0.25 ln(sigma), as EDM's schedulers "
                "have it, and are taken for that. Set timestep_type='log_sigma' in the config if "
                "it's right, and 'linear' if not."
            )
        expected = f"between 0 and {schedule.num_train_timesteps:g}"
        if schedule.timestep_type == "log_sigma":
            expected = "0.25 ln(sigma)"
        return (
            f"{self.denoiser} got timesteps that T-LoRA doesn't expect: they should be {expected}, "
            f"but not all of the latest are (now: {timestep.value}). The mask is wrong unless you "
            "set num_train_timesteps, timestep_reversed and timestep_type in the config as the "
            "scheduler has it, or give the timestep with peft_tlora.timestep_context."
        )

    def _record(self) -> _Forward | None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        forward = _Forward(self._explicit or self._captured)
        self._forwards.append(forward)
        self._recomputed = None
        self._last_number = forward.first
        return forward

    def _close(self, forward: _Forward | None) -> None:
        if forward is not None:
            forward.end = self._last_number = _next_sequence_number()

    def _of_recomputation(self) -> CapturedTimestep | None:
        if torch.compiler.is_compiling() or not self._forwards:
            return None
        number = _backward_sequence_number()
        if number is None:
            return None
        outer = self._recomputed
        if outer is not None and outer.thread == threading.get_ident():
            if number >= self._last_number:
                # no forward has used this number: a recomputed block holds a checkpoint itself
                return outer.timestep
        for forward in reversed(self._forwards):
            if forward.owns(number):
                self._recomputed = forward
                return forward.timestep
        if len(self._forwards) == self._forwards.maxlen and number < self._forwards[0].first:
            raise RuntimeError(
                f"More than {self._forwards.maxlen} forwards of {self.denoiser} came before this "
                "backward, so the timestep of a checkpointed block is no longer known. Call "
                "backward earlier."
            )
        return None if outer is None else outer.timestep


@runtime_checkable
class HasTimestepState(Protocol):
    """A layer whose forward depends on a timestep."""

    timestep_state: TimestepState


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
        if isinstance(module, HasTimestepState)
    }
    if not states:
        raise ValueError(
            f"{type(model).__name__} has no T-LoRA layer; add an adapter with a TLoraConfig first."
        )
    with ExitStack() as stack:
        for state in states.values():
            stack.enter_context(state.explicit(state.capture(timestep)))
        yield


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _next_sequence_number() -> int:
    return torch.autograd._get_sequence_nr()


def _backward_sequence_number() -> int | None:
    """Sequence number of the autograd node that runs now, None outside of backward."""
    if torch._C._current_graph_task_id() == -1:
        return None
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()
