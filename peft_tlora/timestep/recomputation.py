"""Finds the forward that a block recomputed by gradient checkpointing belongs to.

Such a block runs once more during backward, when the timestep of its forward is gone or belongs to
another one. Each forward owns the autograd nodes whose sequence numbers were handed out while it
ran, and the node that triggers a recomputation is one of them. This holds for torch's checkpointing
functions, reentrant or not.
"""

import threading
from collections import deque
from typing import Generic, TypeVar

import torch

from ..integrations.torch import (
    backward_sequence_number,
    current_device,
    next_sequence_number,
)

# forwards whose backward may still come; each costs one small tensor
_MAX_PENDING_FORWARDS = 4096
Value = TypeVar("Value")


class Forward(Generic[Value]):
    """A forward that may be recomputed: the autograd sequence numbers it used, and its value."""

    def __init__(self, value: Value | None) -> None:
        self.value = value
        self.thread = threading.get_ident()  # each thread counts for itself
        self.device = current_device()
        self.first = next_sequence_number()
        self.end: int | None = None

    def owns(self, sequence_number: int) -> bool:
        """Whether it handed out a sequence number."""
        return self.first <= sequence_number and (self.end is None or sequence_number < self.end)


class _Latest(threading.local, Generic[Value]):
    """What a thread has recomputed last, and the last number that one of its forwards used."""

    recomputed: Forward[Value] | None = None
    number = 0


class ForwardLog(Generic[Value]):
    """The latest forwards of a model, each with a value that its recomputation needs.

    Args:
        name: Name of the model, for messages.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self._forwards: deque[Forward[Value]] = deque(maxlen=_MAX_PENDING_FORWARDS)
        self._latest: _Latest[Value] = _Latest()

    def open(self, value: Value | None) -> Forward[Value] | None:
        """Note that a forward starts; None if it can't be recomputed."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        forward = Forward(value)
        self._forwards.append(forward)
        self._latest.recomputed = None
        self._latest.number = forward.first
        return forward

    def close(self, forward: Forward[Value] | None) -> None:
        """Note that a forward has ended."""
        if forward is not None:
            forward.end = self._latest.number = next_sequence_number()

    def value_of_recomputation(self) -> Value | None:
        """The value of the forward that runs again now, None outside of a recomputation.

        Raises:
            RuntimeError: If that forward is too long ago, or several may be the one.
        """
        if torch.compiler.is_compiling() or not self._forwards:
            return None
        number = backward_sequence_number()
        if number is None:
            return None
        outer = self._latest.recomputed
        if outer is not None and outer.thread == threading.get_ident():
            if number >= self._latest.number:
                # no forward has used this number: a recomputed block holds a checkpoint itself
                return outer.value
        forward = self._owner(number)
        if forward is not None:
            self._latest.recomputed = forward
            return forward.value
        if len(self._forwards) == self._forwards.maxlen and number < self._forwards[0].first:
            raise RuntimeError(
                f"More than {self._forwards.maxlen} forwards of {self.name} came before this "
                "backward, so the timestep of a checkpointed block is no longer known. Call "
                "backward earlier."
            )
        return None if outer is None else outer.value

    def _owner(self, number: int) -> Forward[Value] | None:
        """The forward that handed out a number: of this thread, or else of its device."""
        owners: dict[int, Forward[Value]] = {}  # the latest of each thread
        for forward in reversed(tuple(self._forwards)):
            if forward.owns(number):
                if forward.thread == threading.get_ident():
                    return forward
                owners.setdefault(forward.thread, forward)
        found = list(owners.values())
        if len(found) > 1:
            device = current_device()
            found = [forward for forward in found if forward.device == device]
        if len(found) > 1:
            raise RuntimeError(
                f"Forwards of {self.name} in several threads are to be recomputed on one device, "
                "and it can't be told whose block this is. Call backward in the thread of the "
                "forward, or train without gradient checkpointing."
            )
        return found[0] if found else None
