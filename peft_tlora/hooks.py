"""Connects T-LoRA layers with the timestep of their denoiser: a hook reads it at each forward."""

import warnings

from torch import nn

from .denoisers import Denoiser, find_denoiser, forward_arguments, is_known, library_of
from .timestep import TimestepLayer, TimestepState

_HOOK = "_tlora_timestep_hook"
_NOISE_WORDS = ("time", "sigma", "noise")


def connect(model: nn.Module) -> None:
    """Give each T-LoRA layer of a model the state of its denoiser, and hook the denoisers.

    Layers without a denoiser share a state of their own, which only `timestep_context` sets.
    """
    lone = TimestepState(type(model).__name__ if _looks_like_denoiser(type(model)) else None)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, TimestepLayer):
            continue
        found = find_denoiser(model, name)
        if found is not None:
            layer.timestep_state = _hook(*found)
        elif layer.timestep_state is None:
            layer.timestep_state = lone


def disconnect(module: nn.Module) -> None:
    """Take the hook of `connect` off a module, if it has one."""
    hook = module.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.remove()


class _TimestepHook:
    """Reads the timestep argument of a denoiser's forward; copies and pickles with the module."""

    def __init__(self, module: nn.Module, denoiser: Denoiser) -> None:
        self.state = TimestepState(
            type(module).__name__,
            per_sample=denoiser.per_sample,
            detects_log_sigma=denoiser.timestep_type is None,
        )
        self.argument = denoiser.argument
        arguments = forward_arguments(type(module))
        self.position = arguments.index(self.argument) if self.argument in arguments else None
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = None
        if self.argument in kwargs:
            timestep = kwargs[self.argument]
        elif self.position is not None and self.position < len(args):
            timestep = args[self.position]
        self.state.begin_forward(timestep)

    def after(self, module: nn.Module, args: tuple, output: object) -> None:
        self.state.end_forward()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _hook(module: nn.Module, denoiser: Denoiser) -> TimestepState:
    if _HOOK not in module.__dict__:
        for inner in module.modules():  # an adapter may have been put into a part of it before
            disconnect(inner)
        module.__dict__[_HOOK] = _TimestepHook(module, denoiser)
        if library_of(type(module)) == "diffusers" and not is_known(module):
            warnings.warn(
                f"peft_tlora doesn't know {type(module).__name__} of this version of diffusers. It "
                f"takes its argument `{denoiser.argument}` to count from 0 (clean) to 1000 (pure "
                "noise); if it doesn't, set num_train_timesteps, timestep_reversed and "
                "timestep_type in the config.",
                stacklevel=2,
            )
    return module.__dict__[_HOOK].state


def _looks_like_denoiser(cls: type[nn.Module]) -> bool:
    if library_of(cls) == "transformers":
        return False
    return any(word in name for name in forward_arguments(cls) for word in _NOISE_WORDS)
