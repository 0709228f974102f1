"""T-LoRA layers: PEFT's LoRA layers with singular values, frozen factors and a timestep.

PEFT makes each layer, so that its dispatch and its handling of several adapters stay in force; a
T-LoRA layer then takes its place (`peft_tlora.dispatch`), and the masked update becomes the
adapter's variant, which is PEFT's way to change what a LoRA layer computes.
"""

from itertools import chain
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from .encoding import decode_recipe, decode_schedule, encode_schedule
from .frozen import Recipe, rebuild
from .functional import autocast_dtype
from .ranks import groups_of
from .timestep import TimestepLayer
from .variant import TLoraVariant

FROZEN = ("lora_A_init", "lora_B_init", "lora_lambda_init", "lora_schedule")


_NO_FROZEN_FACTORS = (
    "The weights for {} come with a schedule but without frozen factors (lora_A_init, lora_B_init, "
    "lora_lambda_init), and the adapter would compute something else without them. If the file has "
    "them, load it into an adapter with save_initial_factors=True."
)


class Factor(nn.Module):
    """One tensor of an adapter, as a module so that its name ends in `.weight` as LoRA's do.

    Args:
        weight: The tensor.
        trainable: Whether it becomes a parameter; a buffer if not.
        saved: Whether a buffer belongs to the state dict.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, trainable: bool = False, saved: bool = True) -> None:
        super().__init__()
        if trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight, persistent=saved)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes `x W^T + b` from tensors of its own, and nobody watches it."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__  # accelerate and diffusers wrap it
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and type(module.weight.data) is Tensor
    )


class TLoraLayer(TimestepLayer, lora.LoraLayer):
    """A LoRA layer some of whose adapters are T-LoRA; mixed into PEFT's layer classes."""

    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, "lora_lambda")
    other_param_names = (*lora.LoraLayer.other_param_names, *FROZEN)
    # torch types what hangs on a module as Tensor | Module
    lora_A: Any
    lora_B: Any
    lora_lambda: Any
    lora_A_init: Any
    lora_B_init: Any
    lora_lambda_init: Any
    lora_schedule: Any

    def tlora_variant(self, adapter: str) -> TLoraVariant | None:
        """What a T-LoRA adapter computes in this layer; None for an adapter of another kind."""
        variant = self.lora_variant.get(adapter)
        return variant if isinstance(variant, TLoraVariant) else None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Weight of the update at the timestep of the context, at full rank without one."""
        variant = self.tlora_variant(adapter)
        if variant is None:
            return super().get_delta_weight(adapter)  # pyright: ignore[reportAttributeAccessIssue]
        return variant.delta_weight(self, adapter, variant.ranks.of_context(self))

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """Leave the input of T-LoRA adapters as it is: they say in which dtype they compute."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if all(self.tlora_variant(name) for name in names):
            return x
        return super()._cast_input_dtype(x, dtype)

    def _mixed_batch_forward(
        self, x: Tensor, *args: object, adapter_names: list[str], **kwargs: object
    ) -> Tensor:
        """A batch whose samples name their adapters: each with its adapter's and its own mask."""
        masked = {name for name in adapter_names if self.tlora_variant(name)}
        plain = ["__base__" if name in masked else name for name in adapter_names]
        # not super(): PEFT's layers for quantised bases don't all take the arguments of lora.Linear
        result = lora.LoraLayer._mixed_batch_forward(self, x, *args, adapter_names=plain, **kwargs)
        for name in sorted(masked):
            samples = [i for i, other in enumerate(adapter_names) if other == name]
            part = self.lora_variant[name].forward(
                self, name, x[samples], result[samples], samples=samples, batch=len(x)
            )
            result[samples] = part.to(result.dtype)
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and its variant, which PEFT before 0.20 leaves to the next adapter."""
        super().delete_adapter(adapter_name)
        self.lora_variant.pop(adapter_name, None)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move without PEFT's cast to the base layer's dtype.

        PEFT calls this after it has put a file's tensors into an adapter made on the meta device.
        Rounding the trained and the frozen factors there would lose most of their difference.
        """
        variant = self.tlora_variant(adapter_name)
        if variant is None:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            return
        base: Any = self.get_base_layer()
        device = device or next(chain(base.parameters(), base.buffers())).device
        for name in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, name)
            if not isinstance(container, nn.ModuleDict) or adapter_name not in container:
                continue
            factor = container[adapter_name]
            if name == "lora_schedule" and factor.weight.is_meta:  # a file of plain LoRA has none
                self.keep_schedule(adapter_name, variant)
            elif not any(t.is_meta for t in chain(factor.parameters(), factor.buffers())):
                factor.to(device)

    def cast_frozen(self, adapter: str) -> None:
        """Give an adapter's frozen factors the dtype of the trained ones."""
        dtype = self.lora_A[adapter].weight.dtype
        for name in FROZEN:
            container = getattr(self, name)
            if adapter in container:
                container[adapter].to(dtype)  # leaves the integers of the schedule alone

    def set_frozen(
        self, adapter: str, q0: Tensor, p0: Tensor, lam0: Tensor, *, saved: bool
    ) -> None:
        """Give an adapter its frozen factors, and say whether a state dict holds them."""
        self.lora_A_init[adapter] = Factor(q0, saved=saved)
        self.lora_B_init[adapter] = Factor(p0, saved=saved)
        self.lora_lambda_init[adapter] = Factor(lam0, saved=saved)

    def keep_schedule(
        self, adapter: str, variant: TLoraVariant, recipe: Recipe | None = None
    ) -> None:
        """Put an adapter's schedule among its weights, where a file takes it along.

        So it does with the recipe of the frozen factors, if these stay out of the file.
        """
        encoded = encode_schedule(
            variant.ranks.schedule, self.lora_alpha[adapter], self.use_rslora[adapter], recipe
        )
        self.lora_schedule[adapter] = Factor(encoded.to(self.lora_A[adapter].weight.device))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """Load, and follow the schedule that the weights were trained with."""
        super()._load_from_state_dict(state_dict, prefix, *args)  # pyright: ignore[reportAttributeAccessIssue]
        for adapter in self.lora_variant:
            encoded = state_dict.get(f"{prefix}lora_schedule.{adapter}.weight")
            variant = self.tlora_variant(adapter)
            if encoded is not None and variant is not None:
                variant.follow(self, decode_schedule(encoded, self.r[adapter])[0])
                if adapter in self.lora_lambda:
                    recipe = decode_recipe(encoded)
                    if recipe is None and f"{prefix}lora_A_init.{adapter}.weight" not in state_dict:
                        raise ValueError(_NO_FROZEN_FACTORS.format(variant.ranks.layer_name))
                    trained = state_dict[f"{prefix}lora_A.{adapter}.weight"]
                    name = variant.ranks.layer_name
                    self._follow_frozen(adapter, recipe, name, trained.dtype)

    def _follow_frozen(
        self, adapter: str, recipe: Recipe | None, layer_name: str, dtype: torch.dtype
    ) -> None:
        """Make the frozen factors that a file leaves out, or room for those that it has.

        Made ones are rounded to the `dtype` of the file, as they would have been in it.
        """
        q0, p0, lam0 = (getattr(self, name)[adapter].weight for name in FROZEN[:3])
        if recipe is not None:
            like = q0
            if q0.is_meta or decode_recipe(self.lora_schedule[adapter].weight) != recipe:
                p0, lam0, q0 = rebuild(recipe, q0, p0, groups_of(self), layer_name)
            q0, p0, lam0 = (factor.to(dtype) for factor in (q0, p0, lam0))
            if not like.is_meta:
                q0, p0, lam0 = (factor.to(like) for factor in (q0, p0, lam0))
        self.set_frozen(adapter, q0, p0, lam0, saved=recipe is None)


class UnquantizedLayer(TLoraLayer):
    """T-LoRA on a layer whose weight PEFT takes for a plain tensor."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, all active ones if no names are given, into the base weight.

        Raises:
            ValueError: If the weight is quantised after all, as by quanto or GGUF: PEFT would
                change a temporary copy of it, and the adapter would silently be lost.
        """
        weight: Any = self.get_base_layer().weight
        cls = type(weight.data)
        if cls.__module__.partition(".")[0] != "torch" or not weight.is_floating_point():
            raise ValueError(
                f"Adapters can't be merged into a {type(self.get_base_layer()).__name__} whose "
                f"weight is a {cls.__module__}.{cls.__name__} of {weight.dtype}: leave them "
                "unmerged, or merge them into the model before it is quantised."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


class Linear(UnquantizedLayer, lora.Linear):
    """T-LoRA on nn.Linear and transformers' Conv1D."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters, (batch, ..., out)."""
        if not args and not kwargs and not self.disable_adapters and not self.merged:
            result = self._forward_at_once(x)
            if result is not None:
                return result
        return super().forward(x, *args, **kwargs)

    def _forward_at_once(self, x: Tensor) -> Tensor | None:
        """The output, if base layer and update can be computed in one go; None if not."""
        base: Any = self.base_layer
        if torch.compiler.is_compiling() or not is_plain_linear(base):
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        variant = self.tlora_variant(names[0]) if len(names) == 1 else None
        if variant is None:
            return None
        weight, bias, dropout = base.weight, base.bias, self.lora_dropout[names[0]]
        fits = (
            x.shape[-1] == base.in_features  # or the base layer has something to say
            and x.dtype == weight.dtype == self.lora_A[names[0]].weight.dtype
            and x.dtype in (torch.float32, torch.float64)  # fewer bits would lose the update
            and autocast_dtype(x) is None
        )
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if not fits or trained or (dropout.training and not isinstance(dropout, nn.Identity)):
            return None
        return variant.forward_of_linear(self, names[0], x)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can convert an adapter: T-LoRA at one mask, as a merge."""
        variant = self.tlora_variant(adapter_name)
        if variant is None:
            return super().supports_lora_conversion(adapter_name)
        variant.warn_of_one_mask(self, "Converting")
        return True


class Conv1d(UnquantizedLayer, lora.Conv1d):
    """T-LoRA on nn.Conv1d."""


class Conv2d(UnquantizedLayer, lora.Conv2d):
    """T-LoRA on nn.Conv2d."""


class Conv3d(UnquantizedLayer, lora.Conv3d):
    """T-LoRA on nn.Conv3d."""
