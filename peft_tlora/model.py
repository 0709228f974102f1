"""TLoraModel: PEFT's tuner for T-LoRA."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Embedding
from torch import nn

from .config import TLoraConfig
from .denoisers import Denoiser, find_denoiser
from .hooks import connect, disconnect
from .integrations.diffusers import refuse_hotswap_preparation
from .layer import add_tlora, as_tlora_layer
from .orthogonal import derive_seed


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
        refuse_hotswap_preparation(model)
        config = self.peft_config[adapter_name]
        seed = getattr(config, "init_seed", None)
        self._base_seed = int(torch.randint(2**62, ())) if seed is None else seed
        self._oversized: list[str] = []
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        connect(model)
        if self._oversized:
            warnings.warn(
                f"r exceeds the smaller dimension of {len(self._oversized)} layers: "
                f"{', '.join(self._oversized)}. Their surplus ranks start with singular value 0.",
                stacklevel=2,
            )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the factors of T-LoRA adapters can't be combined as those of LoRA are.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "add_weighted_adapter is not supported with T-LoRA: each adapter has its own mask. "
            "Activate several adapters with set_adapter(['a', 'b']), with weights through "
            "diffusers' set_adapters."
        )

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
        seeded = lora_config.init_seed is not None
        with _seeded(derive_seed(self._base_seed, current_key)) if seeded else nullcontext():
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
            )
        tied = target_name in (getattr(lora_config, "target_modules_to_tie", None) or ())
        if tied or isinstance(getattr(parent, target_name), Embedding):
            return  # sees no timestep: plain LoRA at full rank
        layer = as_tlora_layer(getattr(parent, target_name), current_key)
        setattr(parent, target_name, layer)
        found = find_denoiser(self.model, current_key)
        denoiser = Denoiser() if found is None else found[1]
        r = layer.r[adapter_name]
        add_tlora(
            layer,
            adapter_name,
            lora_config,
            current_key,
            lora_config.schedule(
                r, denoiser.num_train_timesteps, denoiser.timestep_reversed, denoiser.timestep_type
            ),
            seed=self._base_seed,
            layout=denoiser.layout(current_key),
        )
        lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        if lora_config.ortho_init is not None and r > min(lora_A[0].numel(), len(lora_B)):
            self._oversized.append(current_key)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in model.modules():
            disconnect(module)
        return model

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "path_initial_model_for_weight_conversion is not supported with T-LoRA, which never "
            "changes the base weights; save without it."
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Make torch's CPU generator a function of `seed`, and put it back."""
    previous = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(previous)
