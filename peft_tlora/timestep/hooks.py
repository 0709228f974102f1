"""Connects T-LoRA layers with the timestep of their denoiser: a hook reads it at each forward."""

from typing import Any

from torch import nn

from ..integrations.diffusers import token_shard
from .denoisers import (
    Denoiser,
    find_denoiser,
    forward_arguments,
    is_known,
    is_timeless,
)
from .paths import follow_path, root_of
from .state import TimestepLayer, TimestepState

_HOOK = "_tlora_timestep_hook"


def connect(model: nn.Module, unit_is_given: bool) -> None:
    """Give each T-LoRA layer of a model the state of its denoiser, and hook the denoisers.

    Layers without a denoiser share a state of their own, which only `timestep_context` sets; those
    of a text encoder or autoencoder expect none.

    Args:
        model: The model.
        unit_is_given: Whether the config of the new adapter says how timesteps count.
    """
    timeless = TimestepState(None)
    lone = TimestepState(type(model).__name__, takes_timestep=False)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, TimestepLayer):
            continue
        found = find_denoiser(model, name)
        if found is not None and found.denoiser.is_timeless(found.inside):
            layer.timestep_state = timeless
        elif found is not None:
            layer.timestep_state = _hook(found.module, found.denoiser, unit_is_given)
        elif layer.timestep_state is None:
            layer.timestep_state = timeless if _is_in_timeless(model, name) else lone


def disconnect(module: nn.Module) -> None:
    """Take the hook of `connect` off a module, if it has one."""
    hook = module.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.remove()


class TimestepHook:
    """Reads the timestep argument of a denoiser's forward; copies and pickles with the module."""

    def __init__(self, module: nn.Module, denoiser: Denoiser) -> None:
        self.state = TimestepState(
            type(module).__name__,
            per_sample=denoiser.per_sample,
            detects_log_sigma=denoiser.timestep_type is None,
        )
        self.argument, self.path = denoiser.argument, None
        if denoiser.argument is not None and root_of(denoiser.argument) != denoiser.argument:
            self.argument, self.path = root_of(denoiser.argument), denoiser.argument
        arguments = forward_arguments(type(module))
        self.position = arguments.index(self.argument) if self.argument in arguments else None
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]

    def read(self, args: tuple, kwargs: dict) -> Any:
        """The timestep among the arguments of a forward, None if it isn't there."""
        timestep = None
        if self.argument in kwargs:
            timestep = kwargs[self.argument]
        elif self.position is not None and self.position < len(args):
            timestep = args[self.position]
        if self.path is not None:
            timestep = follow_path(self.path, timestep)
        return timestep

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Let the layers know the timestep of the forward that starts."""
        self.state.begin_forward(self.read(args, kwargs), token_shard(module), module)

    def after(self, module: nn.Module, args: tuple, output: object) -> None:
        """Let them forget it."""
        self.state.end_forward()

    def remove(self) -> None:
        """Take it off the module."""
        for handle in self.handles:
            handle.remove()


def hooks_of(model: nn.Module) -> list[tuple[nn.Module, TimestepHook]]:
    """The denoisers in a model, with their hooks."""
    return [(m, m.__dict__[_HOOK]) for m in model.modules() if _HOOK in m.__dict__]


def _hook(module: nn.Module, denoiser: Denoiser, unit_is_given: bool) -> TimestepState:
    if _HOOK not in module.__dict__:
        for inner in module.modules():  # an adapter may have been put into a part of it before
            disconnect(inner)
        module.__dict__[_HOOK] = TimestepHook(module, denoiser)
    state = module.__dict__[_HOOK].state
    state.layers = None
    if not unit_is_given and not is_known(module):
        state.assumption = (
            f"peft_tlora doesn't know {type(module).__name__}. It takes its argument "
            f"`{denoiser.argument}` to count from 0 (clean) to 1000 (pure noise). Say how it does "
            "with num_train_timesteps and timestep_reversed in the config, also if that is right."
        )
    return state


def _is_in_timeless(model: nn.Module, layer_name: str) -> bool:
    """Whether a layer lies in a module without time, of those between it and the model."""
    module = model
    for attribute in layer_name.split("."):
        if is_timeless(module):
            return True
        module = getattr(module, attribute)
    return False
