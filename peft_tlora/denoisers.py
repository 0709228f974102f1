"""Which modules are denoisers, how each takes its timestep, and the hook that reads it."""

import inspect
from dataclasses import dataclass

from torch import nn

from .timestep import HasTimestepState, TimestepState

_HOOK = "_tlora_timestep_hook"


@dataclass(frozen=True)
class Denoiser:
    """How a class of denoisers is told the time.

    Args:
        argument: Name of the timestep argument of its forward.
        num_train_timesteps: The value that means pure noise (or clean, if reversed).
        timestep_reversed: Whether 0 is pure noise.
        repacked: Names of submodules whose rows are not batch-major: there samples can be told
            apart only if the first dimension is the batch itself.
    """

    argument: str = "timestep"
    num_train_timesteps: float = 1000.0
    timestep_reversed: bool = False
    repacked: tuple[str, ...] = ()


# by class name, subclasses included; anything that isn't here counts as unknown, and a user may add
# a class of their own before making an adapter
DENOISERS: dict[str, Denoiser] = {
    "FluxTransformer2DModel": Denoiser(num_train_timesteps=1.0),
    "Lumina2Transformer2DModel": Denoiser(num_train_timesteps=1.0, timestep_reversed=True),
    "QwenImageTransformer2DModel": Denoiser(
        num_train_timesteps=1.0, repacked=("time_text_embed", "img_mod")
    ),
    "SD3Transformer2DModel": Denoiser(),
    "UNet2DConditionModel": Denoiser(),
    "WanTransformer3DModel": Denoiser(),
    "ZImageTransformer2DModel": Denoiser(
        argument="t",
        num_train_timesteps=1.0,
        timestep_reversed=True,
        repacked=("all_x_embedder", "cap_embedder", "siglip_embedder"),
    ),
}
_GENERIC_ARGUMENTS = ("timestep", "timesteps", "t")
_NOISE_WORDS = ("time", "sigma", "noise")


def describe(cls: type[nn.Module]) -> Denoiser | None:
    """How a class of modules takes its timestep, None if it takes none.

    A class of an unknown library counts if its forward has an argument `timestep`, `timesteps` or
    `t`. Unknown classes of diffusers are the inner blocks, whose `timestep` is an embedding, and
    those of transformers mean another time.
    """
    for base in cls.__mro__:
        if base.__name__ in DENOISERS:
            return DENOISERS[base.__name__]
    if _library(cls) in ("diffusers", "transformers"):
        return None
    arguments = _forward_arguments(cls)
    name = next((name for name in _GENERIC_ARGUMENTS if name in arguments), None)
    return None if name is None else Denoiser(argument=name)


def find_denoiser(model: nn.Module, layer_name: str) -> tuple[nn.Module, Denoiser] | None:
    """The outermost module that holds a layer and takes a timestep; known classes go first."""
    path = [model]
    for attribute in layer_name.split(".")[:-1]:
        path.append(getattr(path[-1], attribute))
    takers = [(module, found) for module in path if (found := describe(type(module)))]
    known = [taker for taker in takers if taker[1] in DENOISERS.values()]
    return next(iter(known or takers), None)


def connect(model: nn.Module) -> None:
    """Give each T-LoRA layer of a model the state of its denoiser, and hook the denoisers.

    Layers without a denoiser share a state of their own, which only `timestep_context` sets.
    """
    lone = TimestepState(type(model).__name__ if _looks_like_denoiser(type(model)) else None)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, HasTimestepState):
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
        self.state = TimestepState(type(module).__name__)
        self.argument = denoiser.argument
        self.position = _forward_arguments(type(module)).index(self.argument)
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.argument in kwargs:
            timestep = kwargs[self.argument]
        else:
            timestep = args[self.position] if self.position < len(args) else None
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
    return module.__dict__[_HOOK].state


def _looks_like_denoiser(cls: type[nn.Module]) -> bool:
    if _library(cls) == "transformers":
        return False
    return any(word in name for name in _forward_arguments(cls) for word in _NOISE_WORDS)


def _library(cls: type[nn.Module]) -> str:
    return cls.__module__.partition(".")[0]


def _forward_arguments(cls: type[nn.Module]) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]
