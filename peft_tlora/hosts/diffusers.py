"""What T-LoRA does in diffusers' loaders.

`load_lora_weights` and `load_lora_adapter` read a file in one function and make the adapter's
config in another, which always builds a `LoraConfig`. Both are wrapped: PEFT's folders get the
names that pipelines expect, weights that hold a T-LoRA schedule a `TLoraConfig`, and everything
else goes to the originals. `peft_tlora.load_tlora_weights` does without them.
"""

import functools
import os
import shlex
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from ..config import TLoraConfig
from ..integrations import diffusers as loaders
from ..layers.layer import TLoraLayer
from ..weights.fit import check_fit
from ..weights.names import component_of
from ..weights.state_dict import (
    SCHEDULE,
    TRAINED_ALONE,
    config_from_state_dict,
    is_foreign,
    is_half,
    is_tlora,
)

_WEIGHTS = "_weights_of_file"  # of a config, until its adapter is injected
_PEFT_PREFIX = "base_model.model."


def install() -> None:
    """Let the loaders recognise T-LoRA, once; warn of an unknown diffusers and leave it alone."""
    if not loaders.wrap(create=_recognising, fetch=_renaming, set_device=_moving_all):
        warnings.warn(
            f"peft_tlora doesn't know the LoRA loader of diffusers {diffusers.__version__}, so "
            "pipe.load_lora_weights won't recognise T-LoRA files; load them with "
            "peft_tlora.load_tlora_weights(pipe, source).",
            stacklevel=2,
        )


def _recognising(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_config(
        state_dict: Mapping[str, Tensor],
        network_alphas: Any,
        metadata: dict[str, Any] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _refuse_hotswap(state_dict, kwargs.get("model_state_dict"), kwargs.get("adapter_name"))
        half = is_half(state_dict)
        if not half and not is_tlora(state_dict):
            return original(state_dict, network_alphas, metadata, *args, **kwargs)
        if half and not metadata:
            raise ValueError(
                f"The file holds {TRAINED_ALONE}. Load it with peft_tlora.load_tlora_weights(pipe, "
                "source, config=TLoraConfig(...)) and the config that it was trained with."
            )
        model = kwargs.get("model_state_dict")
        if model is not None:
            refuse_other_base(state_dict, model)
        config = config_from_state_dict(state_dict) if not metadata else TLoraConfig(**metadata)
        if model is None:  # a text encoder: the tuner will see it
            vars(config)[_WEIGHTS] = state_dict
        return config

    return create_config


def _renaming(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def fetch(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("return_file_metadata", False)
        state_dict, metadata, of_file = original(*args, return_file_metadata=True, **kwargs)
        if is_foreign(state_dict, of_file or {}):
            raise ValueError(
                "The file is T-LoRA as another program writes it, which diffusers would load as "
                "plain LoRA or not at all. Convert it first: "
                f"`peft-tlora convert {_named(args, kwargs)} NEW --to diffusers`."
            )
        rest = (metadata, of_file) if wanted else (metadata,)
        if not is_tlora(state_dict) and not is_half(state_dict):
            return state_dict, *rest
        # diffusers asks the first name only whether there is anything to convert
        state_dict = convert_unet_state_dict_to_peft(state_dict)
        if all(name.startswith(_PEFT_PREFIX) for name in state_dict):
            short = {name.removeprefix(_PEFT_PREFIX): t for name, t in state_dict.items()}
            component = component_of({name.partition(".lora_")[0]: 0 for name in short})
            state_dict = {f"{component}.{name}": tensor for name, tensor in short.items()}
        return state_dict, *rest

    return fetch


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    source = args[0] if args else kwargs.get("pretrained_model_name_or_path_or_dict")
    if not isinstance(source, (str, os.PathLike)):
        return "FILE"
    name = args[1] if len(args) > 1 else kwargs.get("weight_name")
    return shlex.quote(os.path.join(source, name) if name else str(source))


def _moving_all(original: Callable[..., None]) -> Callable[..., None]:
    """`set_lora_device`, which moves lora_A and lora_B, with what else an adapter has."""

    @functools.wraps(original)
    def set_lora_device(
        self: Any, adapter_names: list[str], device: torch.device | str | int
    ) -> None:
        original(self, adapter_names, device)
        for component in self.components.values():
            for layer in component.modules() if isinstance(component, nn.Module) else ():
                for name in adapter_names if isinstance(layer, TLoraLayer) else ():
                    layer.move_adapter(name, device)  # pyright: ignore[reportCallIssue]

    return set_lora_device


def weights_of_file(config: Any) -> Mapping[str, Tensor] | None:
    """Take the weights of the file that a config was made of, if the tuner is to see them."""
    return vars(config).pop(_WEIGHTS, None)


def refuse_other_base(new: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """Refuse an adapter for other layers; torch would notice when they are already in the model.

    Raises:
        ValueError: If the file has other layers, or for other shapes.
    """
    names = {key.rpartition(".")[0] for key in model}
    for layer in (key.removesuffix(SCHEDULE) for key in new if key.endswith(SCHEDULE)):
        place = next((name for name in (f"{layer}.base_layer", layer) if name in names), None)
        q, p = (new[f"{layer}.lora_{x}.weight"] for x in "AB")
        if place is None:
            check_fit(layer, q, p, None, "the model")
        if f"{place}.weight" in model:
            check_fit(layer, q, p, model[f"{place}.weight"], "the model")


def _refuse_hotswap(
    new: Mapping[str, Tensor], model: Mapping[str, Tensor] | None, adapter_name: str | None
) -> None:
    """Refuse to exchange an adapter in place if the old or the new one is T-LoRA.

    diffusers would notice too late, and then delete the old adapter. It passes the name of an
    adapter that the model has only in this case.
    """
    ending = f".{adapter_name}"
    old = [key for key in model or () if f".lora_A{ending}." in key]
    if old and (is_tlora(new) or any(f".lora_schedule{ending}." in key for key in model or ())):
        raise ValueError(
            f"Hotswapping {adapter_name!r} is not supported with T-LoRA, whose adapters hold more "
            "than LoRA's matrices. Load the file under another name and activate it with "
            "set_adapters; delete_adapters frees the memory of the old one."
        )


def refuse_hotswap_preparation(model: nn.Module) -> None:
    """Refuse to add T-LoRA to a model after `enable_lora_hotswap`, which pads LoRA's matrices.

    Raises:
        ValueError: If the model is to be prepared for hotswapping by its next adapter.
    """
    if loaders.is_prepared_for_hotswap(model):
        raise ValueError(
            "enable_lora_hotswap is not supported with T-LoRA: its factors can't be padded to a "
            "common rank. Load the adapters under different names and choose with set_adapters."
        )
