"""T-LoRA layers: PEFT's LoRA layers with singular values, frozen factors and a timestep.

PEFT makes each layer, so that its dispatch and its handling of several adapters stay in force; a
T-LoRA layer then takes its place (`peft_tlora.dispatch`), and the masked update becomes the
adapter's variant, which is PEFT's way to change what a LoRA layer computes.
"""

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from ..timestep.state import TimestepLayer
from ..weights.encoding import Encoded, decode_schedule, encode_schedule
from ..weights.start import Recipe, Start, rebuild, widened
from .factors import Projection, Scale, TensorModule
from .protocol import groups_of
from .variant import TLoraVariant

START = ("lora_A_init", "lora_B_init", "lora_lambda_init")
FROZEN = (*START, "lora_schedule")

_NO_START = (
    "The weights for {} come without the start that the adapter was trained from, or with a part "
    "of it (lora_A_init, lora_B_init, lora_lambda_init): it would compute something else. Save it "
    "where it was trained with get_peft_model_state_dict or save_pretrained."
)
_HALF = (
    "The weights for {} are lora_A and lora_B without lora_lambda: plain LoRA, which would act "
    "beside the start of this T-LoRA adapter and not as it was trained. Load them into an adapter "
    "with a LoraConfig, or if they are of a Vanilla T-LoRA into one with ortho_init=None."
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
    recipes: dict[str, Recipe | None]

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
        """Delete an adapter, and what its start was made of."""
        super().delete_adapter(adapter_name)
        self.recipes.pop(adapter_name, None)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the containers of an adapter's tensors."""
        return (*self.adapter_layer_names, *FROZEN)

    def move_adapter(self, adapter: str, device: torch.device | str | int) -> None:
        """Move all of an adapter's tensors to a device."""
        for part in self.parts:
            container = getattr(self, part)
            if isinstance(container, nn.ModuleDict) and adapter in container:
                container[adapter].to(device)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As in PEFT, but without its cast to a base's dtype of 8 bits, which ruins an adapter."""
        weight = getattr(self.get_base_layer(), "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize < 2:
            self.move_adapter(adapter_name, device or weight.device)
        else:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def start(self, adapter: str) -> Start:
        """The frozen factors of an adapter with an orthogonal initialisation."""
        return Start(*(getattr(self, name)[adapter].weight for name in START))

    def set_start(
        self, adapter: str, start: Start, recipe: Recipe | None, *, saved: bool = False
    ) -> None:
        """Give an adapter its frozen factors.

        Args:
            adapter: Name of the adapter.
            start: The factors. They come to the device of the trained ones, if these are on one.
            recipe: What they are made of; None if only a file can tell, which then holds them.
            saved: Whether files hold them in any case, as they do if they held them before.
        """
        device = self.lora_A[adapter].weight.device
        saved = saved or recipe is None
        for name, cls, factor in zip(START, (Projection, Projection, Scale), start, strict=True):
            container = getattr(self, name)
            if adapter in container:
                saved = saved or container[adapter].saved
            factor = factor if device.type == "meta" else factor.to(device)
            container[adapter] = cls(factor, saved=saved)
        self.recipes[adapter] = recipe

    def keep_schedule(
        self, adapter: str, variant: TLoraVariant, device: torch.device | None = None
    ) -> None:
        """Put an adapter's schedule among its weights, where a file takes it along."""
        encoded = encode_schedule(
            Encoded(
                variant.ranks.schedule,
                self.lora_alpha[adapter],
                self.use_rslora[adapter],
                self.recipes.get(adapter),
            )
        )
        device = device or self.lora_A[adapter].weight.device
        self.lora_schedule[adapter] = TensorModule(encoded.to(device))

    def follow(self, adapter: str, tensors: dict[str, Tensor]) -> None:
        """Follow what a file says of an adapter's schedule and start, before its weights come.

        Trained tensors alone, as hosts save them that keep what requires grad, are taken for
        those of an adapter of the same config.

        Args:
            adapter: Name of the adapter.
            tensors: The file's tensors of this layer by name, such as "lora_A"; a start of another
                shape is replaced by the one that fits.

        Raises:
            ValueError: If the weights are half of an adapter, or can't be of this layer.
        """
        variant = self.tlora_variant(adapter)
        if variant is None or not tensors:
            return
        name = variant.ranks.layer_name
        ortho = adapter in self.lora_lambda
        if ortho and "lora_lambda" not in tensors and {"lora_A", "lora_B"} <= tensors.keys():
            raise ValueError(_HALF.format(name))
        recipe = self.recipes.get(adapter)
        encoded = None
        if "lora_schedule" in tensors:
            encoded = decode_schedule(tensors["lora_schedule"], self.r[adapter], name)
            recipe = encoded.recipe
        held = tensors.keys() & set(START)
        # a start that the file should hold, or that one made for inference has waited for
        needed = ortho and recipe is None and (encoded or not self.start(adapter).q0.any())
        if (needed or held) and len(held) < len(START):
            raise ValueError(_NO_START.format(name))
        if encoded is not None:
            variant.follow(self, encoded.schedule)
        if ortho and held:
            start = Start(*(tensors[part] for part in START))
            start = widened(start, self.lora_A[adapter].weight)
            tensors.update(zip(START, start, strict=True))
            self.set_start(adapter, start, recipe, saved=True)
        elif ortho and recipe is not None and recipe != self.recipes[adapter]:
            factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            self.set_start(adapter, rebuild(recipe, *factors, groups_of(self), name), recipe)
        if encoded is None and self.lora_schedule[adapter].weight.is_meta:  # nobody will bring it
            self.keep_schedule(adapter, variant, next(iter(tensors.values())).device)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """Load, and follow the schedule and the start that the weights were trained with."""
        super()._load_from_state_dict(state_dict, prefix, *args)  # pyright: ignore[reportAttributeAccessIssue]
        for adapter in self.lora_variant:
            keys = {part: f"{prefix}{part}.{adapter}.weight" for part in self.parts}
            if keys["lora_A"] in state_dict:
                # PEFT passes on without the adapter's name what the adapter wouldn't save
                for part in START:
                    if f"{prefix}{part}.weight" in state_dict:
                        state_dict[keys[part]] = state_dict.pop(f"{prefix}{part}.weight")
            tensors = {part: state_dict[key] for part, key in keys.items() if key in state_dict}
            self.follow(adapter, tensors)
            state_dict |= {keys[part]: tensors[part] for part in START if part in tensors}
