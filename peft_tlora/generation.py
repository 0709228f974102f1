"""Generation at the base's speed: each step's mask is in the weights for as long as it holds."""

from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

from .integrations.diffusers import moves_weights
from .layers.attention import MultiheadAttention
from .layers.factors import plain_weight
from .layers.layer import TLoraLayer, UnquantizedLayer
from .layers.protocol import groups_of
from .schedule import RankSchedule
from .timestep.captured import CapturedTimestep
from .timestep.hooks import TimestepHook, hooks_of

# the adapters in a layer's weight: name, active ranks (None: all), scaling, version of the factors
Mask = tuple[tuple[str, int | None, float, tuple[int, ...]], ...]


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
        self._kept.clear()
        self._fused.clear()

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
        if self._fused.get(layer, ()) == mask:
            return
        weight = layer.get_base_layer().weight
        if layer not in self._kept:
            self._kept[layer] = weight.detach().clone()
        kept = self._kept[layer].to(weight.device)
        if mask:
            wide = torch.promote_types(weight.dtype, torch.float32)
            total = kept.to(wide)
            for name, rank, *_ in mask:
                variant = layer.tlora_variant(name)
                if variant is None:
                    delta = layer.get_delta_weight(name)
                else:
                    delta = variant.delta_weight(layer, name, rank)
                total = total + delta.to(weight.device, wide)
            kept = total
        weight.copy_(kept)
        # what PEFT asks for, to leave the adapters out of the forward
        layer.merged_adapters = [name for name, *_ in mask]
        self._fused[layer] = mask


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
        for i, layer in enumerate(self.layers):
            self.mode.fuse(layer, masks[i] if masks else ())


def _masks(layers: list[UnquantizedLayer], timestep: CapturedTimestep) -> list[Mask] | None:
    """What is to be in each layer's weight; None if no one mask is right for all samples."""
    ranks: dict[RankSchedule, int | None] = {}
    masks = []
    for layer in layers:
        mask = []
        for name in layer.active_adapters if not layer.disable_adapters else ():
            if name not in layer.lora_A:
                continue
            variant, rank = layer.tlora_variant(name), None
            if variant is not None:
                schedule = variant.ranks.schedule
                if schedule not in ranks:
                    ranks[schedule] = _one_rank(timestep.active_rank(schedule))
                rank = ranks[schedule]
                if rank is None:
                    return None
            factors = (layer.lora_A[name].weight, layer.lora_B[name].weight)
            version = tuple(f._version for f in factors if not f.is_inference())
            mask.append((name, rank, float(layer.scaling[name]), (*map(id, factors), *version)))
        masks.append(tuple(mask))
    return masks


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
        weight = plain_weight(base, type(base))
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
