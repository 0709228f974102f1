"""TLoraModel: PEFT's tuner for T-LoRA."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Embedding, MultiheadAttention
from torch import Tensor, nn

from .combination import as_plain_lora, order_by_rank, plan_combination
from .config import TLoraConfig
from .hosts import saving
from .hosts.diffusers import (
    refuse_hotswap_preparation,
    refuse_other_base,
    weights_of_file,
)
from .layers.dispatch import become_tlora_layer
from .layers.initialization import add_tlora, begins_at_zero, fill_with_zeros
from .layers.layer import TLoraLayer
from .timestep.denoisers import Denoiser, find_denoiser
from .timestep.hooks import connect, disconnect
from .weights.state_dict import schedule_fields

_NO_CONVERSION = (
    "path_initial_model_for_weight_conversion is not supported with T-LoRA, which never changes "
    "the base weights; save without it."
)


def _gives_unit(config: Any) -> bool:
    fields = ("num_train_timesteps", "timestep_reversed", "timestep_type")
    return any(getattr(config, name, None) is not None for name in fields)


def _custom(config: Any) -> tuple[type, ...]:
    """Classes that the user has registered with layers of their own."""
    return tuple(getattr(config, "_custom_modules", None) or ())


class TLoraModel(LoraModel):
    """Puts T-LoRA adapters (arXiv 2507.05964) into a model.

    It is made by `peft.get_peft_model`, `peft.inject_adapter_in_model` or diffusers' `add_adapter`
    from a `TLoraConfig`. What it does beyond `LoraModel`: its layers mask their ranks by the
    timestep, and the denoiser among the model's modules gets a hook that reads the timestep of each
    forward.

    Args:
        model: The model to be adapted.
        config: The configuration of the adapter.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Make the adapter's weights on the meta device, for loading.
    """

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter to a model and connect its layers with the model's timestep."""
        config: Any = self.peft_config[adapter_name]
        weights = weights_of_file(config)
        try:
            refuse_hotswap_preparation(model)
            if weights is not None:
                refuse_other_base(weights, model.state_dict())
        except ValueError:
            del self.peft_config[adapter_name]  # PEFT put it there before
            raise
        if getattr(config, "init_seed", 0) is None:
            config.init_seed = int(torch.randint(2**62, ()))  # in the config, where a file finds it
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        connect(model, unit_is_given=_gives_unit(config))
        if weights is not None:
            self._follow(adapter_name, weights)
        self._remember(adapter_name, config)
        self._warn_of_layers(adapter_name, config)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **kwargs: Any,
    ) -> None:
        """Add an adapter that is a weighted combination of others; see `LoraModel`.

        The result is a Vanilla T-LoRA. "cat" and "linear" (and "ties", "dare_linear", "dare_ties"
        and "magnitude_prune" likewise) of adapters with the same r and schedule keep the mask: at
        every timestep the result is PEFT's combination of the masked adapters; "cat" is their exact
        weighted sum. Of what mixes the ranks ("svd" and all "..._svd") and of adapters with
        different ranks or schedules, the result has one mask, that of the surrounding
        `timestep_context`.

        Args:
            adapters: Names of the adapters.
            weights: Their weights, which may be negative.
            adapter_name: Name of the new adapter; nothing happens if it exists.
            combination_type: How the adapters are combined.
            **kwargs: As for `LoraModel.add_weighted_adapter`.

        Raises:
            ValueError: If the result would have one mask and there is no `timestep_context`, or if
                PEFT can't combine the adapters.
        """
        arguments = (adapters, weights, adapter_name, combination_type)
        if adapter_name in self.peft_config or set(adapters) - self.peft_config.keys():
            super().add_weighted_adapter(*arguments, **kwargs)  # pyright: ignore[reportArgumentType]
            return
        plan = plan_combination(self, self.peft_config, adapters, combination_type)
        with as_plain_lora(self, self.peft_config, plan):
            super().add_weighted_adapter(*arguments, **kwargs)  # pyright: ignore[reportArgumentType]
        order_by_rank(self, adapter_name, plan)

    def _warn_of_layers(self, adapter_name: str, config: Any) -> None:
        """Name the layers of a new adapter that have no mask, or more ranks than they can use."""
        unmasked, oversized = [], []
        for name, layer in self.model.named_modules():
            if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
                continue
            q, p = (getattr(layer, x)[adapter_name] for x in ("lora_A", "lora_B"))
            if isinstance(layer.get_base_layer(), _custom(config)):
                unmasked.append(name)
            elif isinstance(layer, TLoraLayer) and adapter_name in layer.lora_lambda:
                if layer.r[adapter_name] > min(q.weight[0].numel(), len(p.weight)):
                    oversized.append(name)
        if unmasked:
            warnings.warn(
                f"{len(unmasked)} layers are of classes registered as custom modules, whose "
                "adapters compute what the class says and have no T-LoRA mask: "
                f"{', '.join(unmasked)}.",
                stacklevel=3,
            )
        if oversized:
            warnings.warn(
                f"r exceeds the smaller dimension of {len(oversized)} layers: "
                f"{', '.join(oversized)}. Their surplus ranks start with singular value 0.",
                stacklevel=3,
            )

    def _follow(self, adapter_name: str, weights: Mapping[str, Tensor]) -> None:
        """Follow a file whose tensors a loader of transformers will put in, past the layers."""
        try:
            for name, layer in self.model.named_modules():
                if isinstance(layer, TLoraLayer):
                    parts = {part: f"{name}.{part}.weight" for part in layer.parts}
                    found = {p: weights[key] for p, key in parts.items() if key in weights}
                    layer.follow(adapter_name, found)
        except ValueError:
            self.delete_adapter(adapter_name)
            raise

    def _remember(self, adapter_name: str, config: Any) -> None:
        """Tell what a host's own file of the adapter won't say."""
        for layer in self.model.modules():
            variant = layer.tlora_variant(adapter_name) if isinstance(layer, TLoraLayer) else None
            if variant is not None:
                fields = schedule_fields(variant.ranks.schedule)
                saving.remember(config, {k: v for k, v in fields.items() if "timestep" in k})
                return

    def _create_and_replace(
        self,
        lora_config: TLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        tied = target_name in (getattr(lora_config, "target_modules_to_tie", None) or ())
        zeros = not tied and not _custom(lora_config) and begins_at_zero(lora_config, target)
        # PEFT would draw values, which take longer than all else
        with torch.device("meta") if zeros else nullcontext():
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
            )
        layer: Any = getattr(parent, target_name)
        if zeros:
            fill_with_zeros(layer, adapter_name)
        if isinstance(layer.get_base_layer(), _custom(lora_config)):
            return
        if tied or isinstance(layer, Embedding):
            return  # sees no timestep: plain LoRA at full rank
        self._add_tlora(layer, adapter_name, lora_config, current_key)
        if isinstance(layer, MultiheadAttention):
            inner = layer.get_base_layer().out_proj
            self._add_tlora(inner, adapter_name, lora_config, f"{current_key}.out_proj")

    def _add_tlora(
        self, layer: Any, adapter_name: str, config: TLoraConfig, layer_name: str
    ) -> None:
        """Turn the adapter that PEFT has just added to a layer into T-LoRA."""
        become_tlora_layer(layer, layer_name)
        found = find_denoiser(self.model, layer_name)
        denoiser, inside = found[1:] if found else (Denoiser(), layer_name)
        r = layer.r[adapter_name]
        add_tlora(
            layer,
            adapter_name,
            config,
            layer_name,
            inside,
            config.schedule(
                r, denoiser.num_train_timesteps, denoiser.timestep_reversed, denoiser.timestep_type
            ),
            denoiser.layout(layer_name),
        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in model.modules():
            disconnect(module)
        return model

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(_NO_CONVERSION)
