"""Generation at the base's speed: each step's mask is in the weights for as long as it holds."""

from itertools import repeat
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

from .functional import Factors, interleave
from .integrations.diffusers import moves_weights
from .layers.attention import MultiheadAttention
from .layers.factors import plain_weight
from .layers.layer import TLoraLayer
from .layers.protocol import groups_of
from .layers.unquantized import UnquantizedLayer
from .schedule import RankSchedule
from .timestep.captured import CapturedTimestep
from .timestep.hooks import TimestepHook, hooks_of


class Fused(NamedTuple):
    """An adapter in a layer's weight.

    Args:
        name: Its name.
        rank: Its active ranks, None for all.
        scaling: Its scaling.
        version: The version of its factors.
    """

    name: str
    rank: int | None
    scaling: float
    version: tuple[int, ...]


Mask = tuple[Fused, ...]  # of a layer: all adapters in its weight


class FusedGeneration:
    """Keeps the adapters of a denoiser in its weights while it generates.

        with peft_tlora.FusedGeneration(pipe.unet):
            image = pipe(prompt).images[0]

    LoRA's users fuse an adapter before they generate; T-LoRA's mask moves with the timestep. Here
    the weights are those of the base plus the update at the step's mask, made anew from a copy of
    the base's when the mask changes, and all layers run as the base's do. `set_adapters`, scales,
    `disable_lora` and plain LoRA adapters in the same layers act as ever. What has no merged weight
    (`nn.MultiheadAttention` here, convolutions with groups) runs as without this mode, and so does
    a forward in which gradients are enabled or whose samples have different masks.

    The result differs from the masked adapter's as `fuse_lora`'s does from LoRA's: by the rounding
    of the weights, in 16 bits too. It takes the memory of the adapted base weights once more, and
    reads the timestep, so the host waits for the device once in a forward. One thread at a time may
    call the model.

    Args:
        model: A denoiser of diffusers or a `PeftModel`, or either compiled by `torch.compile`, with
            T-LoRA layers. The mode begins with `enable` or `with`.

    Raises:
        ValueError: When it begins: if the model has no denoiser with T-LoRA layers, or one of them
            can't be fused, as its base is quantised, sharded, offloaded by itself, watched by a
            hook or merged already.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: dict[TLoraLayer, Tensor] = {}
        self._fused: dict[TLoraLayer, Mask] = {}
        self._products: dict[tuple[TLoraLayer, str], tuple[object, Tensor, Tensor, int]] = {}
        self._handles: list[Any] = []

    def enable(self) -> None:
        """Begin; nothing is changed before the next forward."""
        if self._handles:
            raise ValueError("This FusedGeneration is enabled already.")
        found = [(m, hook, _fusible(m)) for m, hook in hooks_of(self.model)]
        if not any(layers for *_, layers in found):
            raise ValueError(
                f"{type(self.model).__name__} has no denoiser with T-LoRA layers: pass the "
                "denoiser, as in FusedGeneration(pipe.unet), after its adapter has been loaded."
            )
        for module, hook, layers in found:
            # inside of a compiled model a hook would become a part of the graph
            outer = self.model if is_compiled_module(self.model) and len(found) == 1 else module
            begin = _Begin(self, hook, layers)
            self._handles.append(outer.register_forward_pre_hook(begin, with_kwargs=True))

    def disable(self) -> None:
        """End, with the base's own weights and the masked adapters as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in list(self._kept):
            self.fuse(layer, ())
        for held in (self._kept, self._fused, self._products):
            held.clear()

    def __enter__(self) -> "FusedGeneration":
        """Enable."""
        self.enable()
        return self

    def __exit__(self, *exception: object) -> None:
        """Disable, also after an exception."""
        self.disable()

    @torch.no_grad()
    def fuse(self, layer: Any, mask: Mask) -> None:
        """Put the base's weight plus the updates of a mask into a layer; () for the base's own."""
        before = self._fused.get(layer, ())
        intact = len(layer.merged_adapters) == len(before)  # or PEFT has unmerged what was merged
        if intact and before == mask:
            return
        weight = layer.get_base_layer().weight
        if layer not in self._kept:
            self._kept[layer] = weight.detach().clone()
        kept = self._kept[layer].to(weight.device)
        wide = torch.promote_types(weight.dtype, torch.float32)
        flat = weight.detach().flatten(1)  # the weight itself, unless it is channels-last
        if len(mask) == 1 and weight.dtype == wide and flat.data_ptr() == weight.data_ptr():
            since = _in_weight(before, mask[0]) if intact else 0
            left, right, scaling = self._product(layer, mask[0], wide, since)
            if since:
                flat.addmm_(left, right, alpha=scaling)
            else:
                torch.addmm(kept.flatten(1), left, right, alpha=scaling, out=flat)
        elif mask:
            total = kept.to(wide, copy=True).flatten(1)
            for adapter in mask:
                left, right, scaling = self._product(layer, adapter, wide)
                total.addmm_(left, right, alpha=scaling)
            weight.copy_(total.view(weight.shape))
        else:
            weight.copy_(kept)
        # what PEFT asks for, to leave the adapters out of the forward
        layer.merged_adapters = [fused.name for fused in mask]
        self._fused[layer] = mask

    def _product(
        self, layer: Any, adapter: Fused, dtype: torch.dtype, since: int = 0
    ) -> tuple[Tensor, Tensor, float]:
        """Two matrices and a factor whose product is the update of an adapter's active ranks.

        Args:
            layer: The layer.
            adapter: The adapter and its mask.
            dtype: Their dtype.
            since: How many ranks are left out at the beginning.
        """
        name, rank, scaling, version = adapter
        device = layer.get_base_layer().weight.device
        key, known = (version, dtype, device), self._products.get((layer, name))
        if known is None or known[0] != key:
            variant = layer.tlora_variant(name)
            factors = (
                Factors(layer.lora_A[name].weight, layer.lora_B[name].weight)
                if variant is None
                else variant.factors(layer, name)
            )
            down, up = factors.to(dtype).fused()
            down, up = down.flatten(1).to(device), up.flatten(1).mT.to(device)
            columns = 1
            if factors.dlam is not None:  # the two columns of a rank side by side
                down, up, columns = interleave(down), interleave(up), 2
            known = self._products[layer, name] = (key, up.contiguous(), down.contiguous(), columns)
        _, up, down, columns = known
        if rank is not None:
            ranks = slice(columns * since, columns * rank)
            up, down = up[ranks], down[ranks]
        if getattr(layer, "fan_in_fan_out", False):
            return down.mT, up, scaling
        return up.mT, down, scaling


def _in_weight(before: Mask, new: Fused) -> int:
    """How many first ranks of an adapter are in a weight that should have more of it, else 0."""
    old = before[0] if len(before) == 1 else None
    if old is None or old.rank is None or new.rank is None or old.rank > new.rank:
        return 0
    return old.rank if old._replace(rank=new.rank) == new else 0


class _Begin(NamedTuple):
    """A hook that prepares the layers of a denoiser for the forward that begins."""

    mode: FusedGeneration
    hook: TimestepHook
    layers: list[UnquantizedLayer]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = self.hook.state.context
        given = self.hook.read(args, kwargs)
        if timestep is None and given is not None:
            timestep = self.hook.state.capture(given)
        masks = None
        if timestep is not None and not torch.is_grad_enabled():
            masks = _masks(self.layers, timestep)
        for layer, mask in zip(self.layers, masks or repeat(()), strict=False):
            self.mode.fuse(layer, mask)


def _masks(layers: list[Any], timestep: CapturedTimestep) -> list[Mask] | None:
    """What is to be in each layer's weight; None if no one mask is right for all samples."""
    ranks: dict[RankSchedule, int | None] = {}
    masks = []
    for layer in layers:
        mask = []
        for name in () if layer.disable_adapters else layer.active_adapters:
            if name not in layer.scaling:
                continue
            variant, rank = layer.tlora_variant(name), None
            if variant is None and (name in layer.lora_variant or layer.lora_bias[name]):
                return None  # DoRA and its like have an update of another form
            if variant is not None:
                schedule = variant.ranks.schedule
                if schedule not in ranks:
                    ranks[schedule] = _one_rank(timestep.active_rank(schedule))
                rank = ranks[schedule]
                if rank is None:
                    return None
            mask.append(Fused(name, rank, float(layer.scaling[name]), _version(layer, name)))
        masks.append(tuple(mask))
    return masks


def _version(layer: Any, name: str) -> tuple[int, ...]:
    """Which tensors an adapter's trained factors are, and how often they were changed in place."""
    version = []
    for part in ("lora_A", "lora_B", "lora_lambda"):
        # past torch's lookup of submodules, which would cost more than all else here
        module = layer._modules[part]._modules.get(name)
        if module is not None:
            weight = module._parameters["weight"]
            version += (id(weight), 0 if weight.is_inference() else weight._version)
    return tuple(version)


def _one_rank(ranks: int | Tensor) -> int | None:
    """The rank that all samples have, None if they differ; a device is waited for."""
    found = {ranks} if isinstance(ranks, int) else set(ranks.flatten().tolist())
    return found.pop() if len(found) == 1 else None


def _fusible(denoiser: nn.Module) -> list[UnquantizedLayer]:
    """The layers of a denoiser whose weights can hold their adapters.

    Raises:
        ValueError: If one can't.
    """
    if moves_weights(denoiser):
        raise ValueError(
            "Group offloading and layerwise casting put other weights into the layers for each "
            "forward, so that FusedGeneration can't: switch them off, or generate without it."
        )
    inside = {
        id(part)
        for module in denoiser.modules()
        if isinstance(module, MultiheadAttention)  # reads its weights by itself
        for part in module.modules()
    }
    layers = []
    for name, layer in denoiser.named_modules():
        if not isinstance(layer, TLoraLayer) or id(layer) in inside or groups_of(layer) > 1:
            continue
        base: Any = layer.get_base_layer()
        weight = plain_weight(base, (type(base),))
        plain = (
            isinstance(layer, UnquantizedLayer)
            and weight is not None
            and type(weight.data) is Tensor
            and not weight.is_meta
            and weight.dtype.itemsize > 1
        )
        if not plain:
            raise ValueError(
                f"FusedGeneration can't change the weight of {name}, a {type(base).__name__} that "
                "is quantised, sharded, offloaded by itself or watched by a hook: generate "
                "without it."
            )
        if layer.merged:
            raise ValueError(
                f"The adapters {layer.merged_adapters} are merged into {name} already: unmerge "
                "them (unfuse_lora, unmerge_adapter) before FusedGeneration."
            )
        layers.append(layer)
    return layers
