"""Brings weights into place that accelerate or diffusers keep elsewhere; their private parts.

Sequential CPU offload, leaf-level group offload and layerwise casting fetch the weights of a module
in hooks around its forward. A T-LoRA layer reads the weights of its factors without calling them,
so it has to run these hooks itself.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

_ACCELERATE_HOOK = "_hf_hook"
_DIFFUSERS_HOOKS = "_diffusers_hook"


def weights_in_place(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """A context in which the weights of modules are as their own forward would find them."""
    hooked = [
        module
        for module in modules
        if _ACCELERATE_HOOK in module.__dict__ or _DIFFUSERS_HOOKS in module.__dict__
    ]
    return _run_hooks(hooked) if hooked else nullcontext()


@contextmanager
def _run_hooks(modules: list[nn.Module]) -> Iterator[None]:
    hooks = [(module, hook) for module in modules for hook in _hooks_of(module)]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in reversed(hooks):
            hook.post_forward(module, None)


def _hooks_of(module: nn.Module) -> list[Any]:
    registry: Any = module.__dict__.get(_DIFFUSERS_HOOKS)
    hooks = [] if registry is None else [registry.hooks[name] for name in registry._hook_order]
    if _ACCELERATE_HOOK in module.__dict__:
        hooks.append(module.__dict__[_ACCELERATE_HOOK])
    return hooks
