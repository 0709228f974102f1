"""The timestep from a function's argument, where a host doesn't call the denoiser itself."""

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import nn

from ..integrations.imports import wrap_function
from ..schedule import check_positive
from .paths import follow_path, root_of
from .state import states_of, timestep_context

Function = TypeVar("Function", bound=Callable[..., Any])


def timestep_from(
    argument: str,
    *,
    model: str | None = None,
    num_train_timesteps: float | None = None,
    timestep_reversed: bool = False,
    function: str | None = None,
) -> Callable[[Function], Function]:
    """Make a decorator: an argument of the function is the timestep of a model while it runs.

    For hosts that run a denoiser's blocks themselves, so that its forward is never called, or pass
    the timestep where the forward doesn't show it. It is `timestep_context` around the function.

        @timestep_from("sigmas[0]", num_train_timesteps=1.0)
        def run_blocks(transformer, latents, sigmas): ...

        timestep_from("timestep", function="trainer.pipeline:model_forward")  # in somebody's code

    Args:
        argument: The timestep among the function's arguments: a name, or a path of attributes and
            elements such as `video.sigma` or `timesteps[0]`. Where it is None, nothing is set.
        model: The model likewise, such as `self.transformer`; None for every module among the
            arguments. One without T-LoRA layers is left alone.
        num_train_timesteps: The timestep that means pure noise; None if it is in the unit of the
            denoiser's forward.
        timestep_reversed: With `num_train_timesteps`: whether 0 is pure noise.
        function: "module:function" or "module:Class.method" to be decorated where it is, now or
            when its module is imported; `*` stands for any part of a name.

    Raises:
        ValueError: If the function has no such argument, when it is decorated, or a number is out
            of its range.
    """
    if num_train_timesteps is not None:
        check_positive(num_train_timesteps, "num_train_timesteps")
    unit = {"num_train_timesteps": num_train_timesteps, "timestep_reversed": timestep_reversed}

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        for path in (argument, model or argument):
            _check_argument(path, signature, function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            arguments = _arguments(signature, args, kwargs)
            timestep = follow_path(argument, arguments.get(root_of(argument)))
            if timestep is None:
                return function(*args, **kwargs)
            if model is None:
                models = list(arguments.values())
            else:
                models = [follow_path(model, arguments.get(root_of(model)))]
            with ExitStack() as stack:
                for module in models:
                    if isinstance(module, nn.Module) and states_of(module):
                        stack.enter_context(timestep_context(module, timestep, **unit))
                return function(*args, **kwargs)

        return wrapper  # pyright: ignore[reportReturnType]

    if function is not None:
        wrap_function(function, decorate)
    return decorate


def _check_argument(path: str, signature: inspect.Signature, function: Callable[..., Any]) -> None:
    parameters = signature.parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if root_of(path) not in parameters and not anything:
        raise ValueError(
            f"{getattr(function, '__qualname__', function)} has no argument {root_of(path)!r} for "
            f"{path!r}, but {', '.join(parameters)}."
        )


def _arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by name; none if the function will refuse the call."""
    try:
        arguments = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments
