"""What a thread's forwards and contexts of one denoiser have set while they last."""

import threading
from collections.abc import Hashable
from typing import Any

from torch import nn

from .captured import CapturedTimestep
from .recomputation import Forward


class Frame:
    """What a forward or a context has set, and what it goes back to when it ends."""

    __slots__ = ("forward", "outer", "timestep")

    def __init__(
        self,
        timestep: CapturedTimestep | None,
        forward: Forward[CapturedTimestep] | None,
        outer: Any,
    ) -> None:
        self.timestep = timestep
        self.forward = forward
        self.outer = outer


class RunningForward(Frame):
    """A denoiser's forward that runs.

    Attributes:
        state: The denoiser's state.
        module: The denoiser.
        context: The context that it began in.
        ahead: What its layers have made ahead, which lasts for this forward only.
    """

    __slots__ = ("ahead", "context", "module", "state")

    def __init__(
        self,
        state: Any,
        module: nn.Module | None,
        timestep: CapturedTimestep | None,
        forward: Forward[CapturedTimestep] | None,
        running: "Running",
    ) -> None:
        super().__init__(timestep, forward, running.forward)
        self.state = state
        self.module = module
        self.context = running.context
        self.ahead: dict[Hashable, Any] = {}


class Running:
    """The innermost forward and the innermost context of a thread."""

    def __init__(self) -> None:
        self.forward: RunningForward | None = None
        self.context: Frame | None = None


class Thread(threading.local):
    """Each thread's own `Running`: torch.compile follows the attributes of a plain object only."""

    def __init__(self) -> None:
        self.running = Running()
