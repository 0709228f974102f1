"""The timestep of a forward, while it runs.

One `TimestepState` serves one denoiser. Its value is set by the denoiser's forward hook or by
`timestep_context`, lasts for that forward only and belongs to the thread that runs it.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..integrations.torch import in_backward, is_traced
from ..schedule import RankSchedule, check_positive
from .captured import CapturedTimestep, Unit
from .frames import Frame, RunningForward, Thread
from .range import TimestepRange
from .recomputation import ForwardLog


class TimestepState:
    """What the T-LoRA layers of one denoiser know of the current timestep.

    Args:
        denoiser_name: Name of the denoiser's class if its layers are expected to have a timestep; a
            forward without one then warns. None for models without time, such as text encoders.
        per_sample: See `CapturedTimestep`.
        detects_log_sigma: Whether the values must tell if timesteps are 0.25 ln(sigma).
        takes_timestep: Whether it is known to take a timestep, and not just expected to.

    Attributes:
        assumption: What was assumed of the timesteps, to be said when the first one is used.
        was_set: Whether a layer has ever had a timestep.
        layers: The denoiser's layers, as who needs them has listed them; None after a change.
    """

    def __init__(
        self,
        denoiser_name: str | None,
        *,
        per_sample: bool = True,
        detects_log_sigma: bool = False,
        takes_timestep: bool = True,
    ) -> None:
        self.denoiser_name = denoiser_name
        self.per_sample = per_sample
        self.detects_log_sigma = detects_log_sigma
        self.takes_timestep = takes_timestep
        self.assumption: str | None = None
        self.was_set = False
        self.layers: list[Any] | None = None
        self._range = TimestepRange(denoiser_name)
        self._log: ForwardLog[CapturedTimestep] = ForwardLog(denoiser_name)
        self._thread = Thread()
        self._contexts = 0
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model start afresh: nothing of a running forward goes along."""
        names = ("denoiser_name", "per_sample", "detects_log_sigma", "takes_timestep", "assumption")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what `__getstate__` kept."""
        assumption = state.pop("assumption")
        self.__init__(**state)
        self.assumption = assumption

    def is_followed(self) -> bool:
        """Whether the ranks of its layers follow a timestep, as far as is known."""
        given = self.takes_timestep or self.was_set or self._contexts > 0
        return self.denoiser_name is not None and given

    def capture(
        self,
        timestep: object,
        unit: Unit | None = None,
        shard: tuple[int, int] | None = None,
    ) -> CapturedTimestep:
        """A timestep as this denoiser means it, or in a unit of its own; see `CapturedTimestep`.

        Raises:
            TypeError: If it is neither a number nor a tensor.
            ValueError: If it is a number that isn't finite, or that a trace would fix.
        """
        captured = CapturedTimestep(timestep, self.per_sample, unit, shard)  # pyright: ignore[reportArgumentType]
        if self.detects_log_sigma and unit is None and not is_traced():
            captured.is_log_sigma = self._range.looks_like_log_sigma(captured.value)
        return captured

    def begin_forward(
        self,
        timestep: object,
        shard: tuple[int, int] | None = None,
        module: nn.Module | None = None,
    ) -> None:
        """Take the timestep of a denoiser's forward that starts now; None if it has none."""
        running = self._thread.running
        captured = None if timestep is None else self.capture(timestep, shard=shard)
        context = running.context
        forward = self._log.open(captured if context is None else context.timestep)
        running.forward = RunningForward(self, module, captured, forward, running)

    def running_forward(self) -> RunningForward | None:
        """The forward that runs now; None in a recomputation, or in a context of a part of it."""
        running = self._thread.running
        forward = running.forward
        if forward is None or running.context is not forward.context or in_backward():
            return None
        return forward

    def end_forward(self) -> None:
        """Go back to the forward around the one that has ended, with or without an exception."""
        running = self._thread.running
        frame = running.forward
        if frame is not None:
            running.forward = frame.outer
            self._log.close(frame.forward)

    @contextmanager
    def explicit(self, timestep: CapturedTimestep) -> Iterator[None]:
        """Set a timestep that wins over the captured one, for this thread."""
        running = self._thread.running
        frame = running.context = Frame(timestep, self._log.open(timestep), running.context)
        self._contexts += 1
        try:
            yield
        finally:
            running.context = frame.outer
            self._contexts -= 1
            self._log.close(frame.forward)

    def current(self) -> CapturedTimestep | None:
        """The timestep that applies to the layer that runs now, None if there is none."""
        timestep = self._log.value_of_recomputation()
        if timestep is not None:
            return timestep
        running = self._thread.running
        if running.context is not None:
            return running.context.timestep
        if running.forward is not None and running.forward.timestep is not None:
            return running.forward.timestep
        if self.denoiser_name is not None:
            self.warn_once(
                "missing",
                f"A T-LoRA layer of {self.denoiser_name} ran without a timestep, so all of its "
                "ranks are active. Call the model itself, not its forward method, with the "
                "timestep as an argument, or set it with `with peft_tlora.timestep_context(model, "
                "timestep):` or, around a function that gets it, with `peft_tlora.timestep_from`. "
                "If the model has no timestep, use LoraConfig, or rank_schedule='constant'.",
            )
        elif self._contexts:
            self.warn_once(
                "thread",
                "A T-LoRA layer ran with all of its ranks in another thread than the one that has "
                "set timestep_context: enter the context in the thread that calls the model.",
            )
        return None

    def watch(self, timestep: CapturedTimestep, schedule: RankSchedule) -> None:
        """Note that a timestep is used; warn once of values that the schedule doesn't expect."""
        self.was_set = True
        if timestep.checked or is_traced():
            return
        timestep.checked = True
        if timestep.unit is not None:
            return
        if self.assumption is not None:
            self.warn_once("assumption", self.assumption)
        complaint = self._range.complaint(timestep.value, schedule, timestep.is_log_sigma)
        if complaint:
            warnings.warn(complaint, stacklevel=2)

    @property
    def context(self) -> CapturedTimestep | None:
        """The timestep of the surrounding `timestep_context`, None outside of one."""
        context = self._thread.running.context
        return None if context is None else context.timestep

    def warn_once(self, topic: str, message: str) -> None:
        """Warn of a topic the first time only."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=2)


class TimestepLayer:
    """A layer whose forward depends on a timestep; mixed into a module."""

    timestep_state: TimestepState | None = None


@contextmanager
def timestep_context(
    model: nn.Module,
    timestep: float | Tensor,
    *,
    num_train_timesteps: float | None = None,
    timestep_reversed: bool = False,
) -> Iterator[None]:
    """Set the timestep of all T-LoRA layers of a model for the forwards inside the context.

    It is needed only where the timestep doesn't reach the denoiser's forward as an argument, and to
    choose the mask that a merge bakes in. It wins over the timestep that the model is called with,
    and the previous one comes back at the end, also after an exception. Blocks recomputed in a
    later backward use it too. It holds for the thread that enters it.

    Args:
        model: Any module that holds T-LoRA layers: a denoiser, a PeftModel, a text encoder.
        timestep: A number or a tensor of shape (), (1,), (batch,) or (batch, tokens), in the unit
            of the denoiser's forward or in the one that is given.
        num_train_timesteps: The timestep that means pure noise; None for the denoiser's unit.
        timestep_reversed: With `num_train_timesteps`: whether 0 is pure noise.

    Raises:
        TypeError: If `model` is not a module or `timestep` neither a number nor a tensor.
        ValueError: If the model has no T-LoRA layer, or a number is not finite.
    """
    unit = None
    if num_train_timesteps is not None:
        check_positive(num_train_timesteps, "num_train_timesteps")
        unit = Unit(float(num_train_timesteps), timestep_reversed)
    elif timestep_reversed:
        raise ValueError(
            "timestep_reversed=True needs num_train_timesteps, the value of a clean picture."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"timestep_context needs a torch.nn.Module, got {type(model).__name__}; for a pipeline "
            "pass its denoiser, as in `timestep_context(pipe.unet, t)`."
        )
    states = states_of(model)
    if not states:
        raise ValueError(
            f"{type(model).__name__} has no T-LoRA layer; add an adapter with a TLoraConfig first."
        )
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(state.explicit(state.capture(timestep, unit)))
        yield


def states_of(model: nn.Module) -> list[TimestepState]:
    """The states of the denoisers whose T-LoRA layers a module holds."""
    states = {
        id(module.timestep_state): module.timestep_state
        for module in model.modules()
        if isinstance(module, TimestepLayer) and module.timestep_state is not None
    }
    return list(states.values())
