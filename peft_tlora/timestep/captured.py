"""One timestep and what follows from it, computed once for all layers."""

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..integrations.torch import is_traced
from ..schedule import RankSchedule

Value = TypeVar("Value")


class Unit(NamedTuple):
    """How a timestep counts, where it isn't as the denoiser's forward does.

    Args:
        num_train_timesteps: The value that means pure noise (or clean, if reversed).
        timestep_reversed: Whether 0 is pure noise.
    """

    num_train_timesteps: float
    timestep_reversed: bool = False


class CapturedTimestep:
    """The timestep of one forward: a number or a tensor of shape (), (batch,) or (batch, tokens).

    Args:
        value: The timestep.
        per_sample: Whether a tensor's values belong to the samples of the batch; if not, the
            noisiest stands for all of them.
        unit: How it counts; None for the unit that the schedule expects.
        shard: If each process of a group has a part of the tokens, which part this one has and of
            how many.

    Raises:
        TypeError: If the value is neither a number nor a tensor.
        ValueError: If a number isn't finite, or stands for a timestep that a trace would fix.
    """

    def __init__(
        self,
        value: float | Tensor,
        per_sample: bool = True,
        unit: Unit | None = None,
        shard: tuple[int, int] | None = None,
    ) -> None:
        if not torch.compiler.is_compiling() and not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"A timestep must be a number or a tensor, got {value!r}.")
            if not math.isfinite(value):
                raise ValueError(f"A timestep must be finite, got {value}.")
            if torch.jit.is_tracing():
                raise ValueError(
                    f"torch.jit.trace would fix the timestep {value}, a Python number, and with it "
                    "the mask for good: pass it as a tensor that is an input of the trace."
                )
        self._given = value
        self.per_sample = per_sample
        self.unit = unit
        self.shard = shard
        self.is_log_sigma: Tensor | None = None  # what the values tell, if they are to tell it
        self.checked = False
        self._active: dict[RankSchedule, int | Tensor] = {}
        self._largest: dict[RankSchedule, int | None] = {}
        self._shared: dict[Hashable, Any] = {}
        self._uniform: bool | None = None

    @property
    def value(self) -> float | Tensor:
        """The timestep as a number or of shape (), (batch,) or (batch, tokens), without a graph.

        It is brought into form where it is read: torch.compile would make a graph of the hook for
        what the hook does to tensors.
        """
        value = self._given
        if not isinstance(value, Tensor):
            if not torch.compiler.is_compiling():
                return value
            return torch.full((), value, dtype=torch.float64)  # one graph for all numbers
        value = value.detach()
        value = value.reshape(()) if value.numel() == 1 else value
        return value.flatten(1) if value.dim() > 2 else value

    def active_rank(self, schedule: RankSchedule) -> int | Tensor:
        """Active ranks of the timestep's shape, or of shape (); computed once a schedule."""
        if is_traced():
            return self._active_rank(schedule)
        if schedule not in self._active:
            self._active[schedule] = self._active_rank(schedule)
        return self._active[schedule]

    def largest_rank(self, schedule: RankSchedule) -> int | None:
        """The largest active rank; None if it lies on a device, or must not get into a graph."""
        if is_traced():
            return None
        if schedule not in self._largest:
            rank = self.active_rank(schedule)
            if isinstance(rank, Tensor):
                rank = int(rank.max()) if rank.device.type == "cpu" else None
            self._largest[schedule] = rank
        return self._largest[schedule]

    def shared(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What `make` returns, made once for each key in this forward."""
        if is_traced():
            return make()
        key = (key, torch.is_inference_mode_enabled())  # its tensors can't be used in training
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def is_uniform(self) -> bool:
        """Whether all samples share one timestep. Reads a device tensor: a last resort."""
        if self._uniform is None:
            t = self.value
            self._uniform = (
                not isinstance(t, Tensor)
                or t.dim() == 0
                or not self.per_sample
                or bool((t == t.flatten()[0]).all())
            )
        return self._uniform

    def _active_rank(self, schedule: RankSchedule) -> int | Tensor:
        if self.unit is not None:
            schedule = replace(schedule, timestep_type="linear", **self.unit._asdict())
        rank = schedule.active_rank(self.value)
        if schedule.timestep_type is None and self.is_log_sigma is not None:
            other = replace(schedule, timestep_type="log_sigma").active_rank(self.value)
            rank = torch.where(self.is_log_sigma, other, rank)
        if isinstance(rank, Tensor) and not self.per_sample:
            rank = rank.amin()
        return rank
