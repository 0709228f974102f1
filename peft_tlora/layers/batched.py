"""Masks and fuses the factors of many layers at once: what is left to a layer depends on its input.

Where layers are small, or an accelerator waits for its host, the operators that make a layer's
factors cost more than those that use them. So the first T-LoRA layer of a denoiser's forward makes
those of all that are alike, some megabytes at a time. They are held by the running forward and let
go as they are used: the next one makes them anew from the parameters, whatever has changed them.
"""

from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from ..functional import Factors, Update, autocast_dtype
from ..integrations.torch import is_sharding
from ..timestep.state import RunningForward, TimestepLayer
from .factors import is_watched
from .plain import Plain, Ready
from .update import Folded, Mask, Masked, is_small

_CHUNK = 2**24  # bytes of factors that are made at a time
_FEW = 2**16  # bytes of a layer's factors up to which it pays on a CPU, too
_NOTHING = (None, None)
Link = tuple[nn.Module, str, nn.Module]  # parent, name and child
_UP = [Factors._fields.index(name) for name in ("dp", "p0")]  # whose ranks are columns


def ready(layer: Any, x: Tensor) -> Ready | None:
    """A layer's update of an input, made ahead or by itself; None if modules must be called."""
    made = _take(layer, x)
    if made is not None:
        return made
    plain = Plain.of(layer)
    return None if plain is None else plain.ready(x)


def _take(layer: Any, x: Tensor) -> Ready | None:
    """What was made ahead for a layer in the running forward; None if it must see to itself."""
    state = layer.timestep_state
    forward = None if state is None else state.running_forward()
    if forward is None:
        return None
    trained, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    key = (x.dtype, x.device, autocast_dtype(x), trained, inference)
    waiting = forward.ahead.get(key)
    if waiting is None:
        waiting = forward.ahead[key] = _waiting(forward, x)
    active, made = waiting.pop(layer, _NOTHING)
    if type(made) is list:
        chunk = [plain for plain in made if plain.layer is layer or plain.layer in waiting]
        waiting.update(_make(chunk, x, trained))
        active, made = waiting.pop(layer)
    if made is None or active is not layer._active_adapter:
        return None
    if x.shape == made.shape:
        return made
    plain, masked = made.plain, made.masked
    mask = masked.mask if masked.mask.gate is None else plain.mask(x, masked.dtype)
    masked = masked._replace(mask=mask, folded=None)
    return Ready(plain, x.shape, plain.goes_at_once(x), masked)


def _waiting(forward: RunningForward, x: Tensor) -> dict[nn.Module, Any]:
    """The layers whose update can be made ahead, each with the ones that it is made with."""
    alike: dict[Hashable, list[Plain]] = {}
    for layer in _unwatched_layers(forward):
        plain = None if layer._disable_adapters or layer.merged_adapters else Plain.of(layer)
        if plain is not None:
            alike.setdefault(plain.kind(), []).append(plain)
    waiting = {}
    for plains in alike.values():
        if not _pays(plains[0], x):
            continue
        size = max(1, _CHUNK // sum(f.nbytes for f in plains[0].factors if f is not None))
        for i in range(0, len(plains), size):
            chunk = plains[i : i + size]
            waiting.update((plain.layer, (None, chunk)) for plain in chunk)
    return waiting


def _make(
    chunk: list[Plain], x: Tensor, trained: bool
) -> Iterator[tuple[nn.Module, tuple[object, Ready]]]:
    """The updates of layers that are alike."""
    first = chunk[0]
    dtype, at_once = first.dtype(x), first.goes_at_once(x)
    mask = first.mask(x, dtype)
    alone, small = Masked(first.factors, mask, dtype), is_small(first.factors)
    updates = _Updates([plain.factors for plain in chunk], mask, dtype)
    with torch.no_grad():
        update = updates.stacked(trained=trained)
        linear = small and not first.trailing
        if linear and alone.folds(x.shape, first.weight if at_once else None):
            weight = torch.stack([plain.weight for plain in chunk]) if at_once else None
            folded = alone.fold(update, weight)
            parts = folded if trained else (*folded[:2], *(None,) * 4)
            made = [(None, Folded(*parts)) for parts in _unstacked(parts, len(chunk))]
        else:
            made = [(Update(*parts), None) for parts in _unstacked(update, len(chunk))]
    for i, (plain, (update, folded)) in enumerate(zip(chunk, made, strict=True)):
        again = partial(updates.again, i) if trained and not small else None
        masked = Masked(plain.factors, mask, dtype, update, folded, again)
        yield plain.layer, (plain.layer._active_adapter, Ready(plain, x.shape, at_once, masked))


class _Updates:
    """The updates of layers that are alike, made together for a forward and for its backward."""

    def __init__(self, factors: list[Factors], mask: Mask, dtype: torch.dtype) -> None:
        self.factors, self.mask, self.dtype = factors, mask, dtype
        self.waiting: dict[int, Update] = {}

    def stacked(self, *, trained: bool) -> Update:
        """All of them, stacked in front."""
        ranks, stacks = self.mask.ranks, []
        for part, tensors in enumerate(zip(*self.factors, strict=True)):
            stack = None if tensors[0] is None else torch.stack(tensors)
            if stack is not None and ranks is not None:  # the leading ones
                stack = stack[..., :ranks] if part in _UP else stack[:, :ranks]
            stacks.append(stack)
        return Factors(*stacks).to(self.dtype).update(self.mask.scale, trained=trained)

    def again(self, index: int) -> Update:
        """One of them in a backward, whose first layer makes them for all."""
        if index not in self.waiting:
            parts = _unstacked(self.stacked(trained=True), len(self.factors))
            self.waiting = {i: Update(*own) for i, own in enumerate(parts)}
        return self.waiting.pop(index)


def _unstacked(parts: tuple, count: int) -> Iterator[tuple]:
    """What each of the layers has of their tensors, stacked or shared by all."""
    stacks = (isinstance(part, Tensor) and part.dim() > 2 for part in parts)
    columns = (
        part.unbind() if stack else (part,) * count
        for part, stack in zip(parts, stacks, strict=True)
    )
    return zip(*columns, strict=True)


def _pays(plain: Plain, x: Tensor) -> bool:
    """Whether the updates of such layers are made ahead."""
    tensors = [factor for factor in plain.factors if factor is not None]
    few = is_small(plain.factors) or sum(t.nbytes for t in tensors) <= _FEW
    return (few or x.device.type != "cpu") and all(
        t.device == x.device for t in (plain.weight, *tensors)
    )


def _unwatched_layers(forward: RunningForward) -> Iterator[Any]:
    """The T-LoRA layers of a denoiser but for those below a module that somebody watches.

    Weights may come there, or change, when the module is called.
    """
    module, state = forward.module, forward.state
    if module is None or getattr(module, "_is_replica", False):  # of nn.DataParallel
        return
    if state.layers is None:
        state.layers = list(_layers_below(module, ()))
    reached: dict[nn.Module, bool] = {}
    for links, layer in state.layers:
        for parent, name, child in links:
            if child not in reached:
                in_place = parent._modules.get(name) is child  # nobody has wrapped it since
                reached[child] = in_place and not is_watched(child) and not is_sharding(child)
        if all(reached[child] for _, _, child in links):
            yield layer


def _layers_below(
    module: nn.Module, above: tuple[Link, ...]
) -> Iterator[tuple[tuple[Link, ...], nn.Module]]:
    """The T-LoRA layers that can be plain, each behind the way to it: parents, names, children."""
    for name, child in module.named_children():
        links = (*above, (module, name, child))
        if isinstance(child, TimestepLayer):
            if isinstance(child, lora.Linear | lora.Conv1d | lora.Conv2d | lora.Conv3d):
                yield links, child
        else:
            yield from _layers_below(child, links)
