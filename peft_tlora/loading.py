"""Loads an adapter into any module or pipeline through public functions of PEFT and diffusers."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from .config import TLoraConfig
from .functional import Factors
from .weights.files import open_file
from .weights.fit import check_factors, check_fit, check_trained, weight_of
from .weights.names import FIELDS, check_name, parsed
from .weights.start import canonical_name
from .weights.state_dict import TRAINED_ALONE, config_from_state_dict, is_half, is_tlora


def load_tlora_weights(
    target: Any,
    source: str | PathLike[str] | Mapping[str, Tensor],
    adapter_name: str | None = None,
    *,
    config: TLoraConfig | None = None,
    **kwargs: Any,
) -> None:
    """Load a T-LoRA adapter into a pipeline or a module.

    After `import peft_tlora` a pipeline's own `load_lora_weights` and PEFT's `from_pretrained` load
    whole files. This function is for modules of hosts that have no loader, for files with the
    trained tensors alone, as hosts save them that keep what requires grad, and for a version of
    diffusers whose loader isn't known. Names are found whatever the host has put before them.

    Args:
        target: A pipeline with `load_lora_weights`, or any module, such as a denoiser. The adapter
            is put into it; a `PeftModel` has `load_adapter` for that.
        source: A folder or file of PEFT or diffusers, a state dict, or for a pipeline a hub id.
        adapter_name: Name of the adapter, "default_0" and so on if None.
        config: The config that the adapter was trained with, if the source doesn't say: its
            schedule, `init_seed`, `lora_alpha` and `ortho_init` count.
        **kwargs: For the pipeline's `lora_state_dict` if `source` is a hub id.

    Raises:
        ValueError: If the source holds no T-LoRA adapter, or none for the target or none that fits
            it, the name is in use, or the config is missing or contradicts the source. Nothing has
            been changed then.
    """
    if isinstance(target, PeftModel):
        raise ValueError(
            "The target is a PeftModel: use its load_adapter, or pass its get_base_model()."
        )
    modules = {"": target} if isinstance(target, nn.Module) else _modules_of(target)
    parts, others = _sorted(_tensors(target, source, kwargs), modules)
    for name, part in list(parts.items()):
        if config is None and not is_tlora(part) and not is_half(part):  # plain LoRA
            others += parts.pop(name)
    if not parts:
        raise ValueError(
            f"{len(others)} tensors were read, but none belongs to a T-LoRA adapter for a model of "
            f"{type(target).__name__}, such as {next(iter(others), 'none')[:200]!r}: load plain "
            "LoRA with the host's own loader, and a Vanilla T-LoRA whose lora_schedule is lost "
            "with config=TLoraConfig(...)."
        )
    taken = {name for part in parts for name in getattr(modules[part], "peft_config", {})}
    if adapter_name is None:
        adapter_name = next(name for i in count() if (name := f"default_{i}") not in taken)
    if adapter_name in taken:
        raise ValueError(f"The adapter name {adapter_name!r} is in use; choose another.")
    configs = {name: _config(part, modules[name], config) for name, part in parts.items()}
    if others:
        warnings.warn(
            f"{len(others)} tensors are of no T-LoRA adapter for a model of "
            f"{type(target).__name__} and aren't loaded, such as {others[0][:200]!r}.",
            stacklevel=2,
        )
    for name, part in parts.items():
        module: Any = modules[name]
        inject_adapter_in_model(configs[name], module, adapter_name=adapter_name)
        set_peft_model_state_dict(module, part, adapter_name)
        if hasattr(module, "_hf_peft_config_loaded"):
            module._hf_peft_config_loaded = (
                True  # what set_adapters and others of diffusers ask for
            )


def _modules_of(pipeline: Any) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in pipeline.components.items()
        if isinstance(module, nn.Module)
    }


def _tensors(
    target: Any, source: str | PathLike[str] | Mapping[str, Tensor], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a source, with PEFT's names for their parts."""
    if isinstance(source, Mapping):
        tensors = dict(source)
    elif Path(source).exists() or isinstance(target, nn.Module):
        tensors = dict(open_file(source).tensors)
    else:
        found = target.lora_state_dict(str(source), **kwargs)
        tensors = found[0] if isinstance(found, tuple) else found
    if any(".lora_linear_layer." in name for name in tensors):  # text encoders' names in diffusers
        ours = {name: t for name, t in tensors.items() if ".lora_linear_layer." in name}
        rest = {name: t for name, t in tensors.items() if name not in ours}
        return {**convert_state_dict_to_peft(ours), **convert_unet_state_dict_to_peft(rest)}
    return convert_unet_state_dict_to_peft(tensors)  # leaves PEFT's own names alone


def _sorted(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The adapters' tensors by model and by the layers' names there, and the names of the rest."""
    names = {part: {name for name, _ in module.named_modules()} for part, module in modules.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    others = []
    adapters = {match["adapter"] for match in map(parsed, tensors) if match}
    if len(adapters) > 1:
        raise ValueError(
            f"The source holds several adapters, {sorted(map(str, adapters))}: pass the tensors of "
            "one of them."
        )
    for name, tensor in tensors.items():
        match = parsed(name)
        place = None if match is None else _place(match["layer"], names)
        if match is None or place is None:
            others.append(name)
            continue
        part, layer = place
        key = f"{layer}.{match['part']}.weight"
        if key in parts.setdefault(part, {}):
            raise ValueError(f"{name[:200]!r} says again what another tensor of its layer said.")
        parts[part][key] = tensor
    return parts, others


def _place(layer: str, names: Mapping[str, set[str]]) -> tuple[str, str] | None:
    """The model that a layer is in and its name there, whatever wrappers and hosts prefixed."""
    whole = canonical_name(layer)
    first, _, rest = whole.partition(".")
    candidates = {first: names[first]} if first in names else names
    whole = short = rest if first in names else whole
    while short:
        for part, known in candidates.items():
            if short in known or short.replace(".base_layer", "") in known:
                return part, short
        short = short.partition(".")[2]
    inside = [
        (part, name)
        for part, known in candidates.items()
        for name in known
        if name.endswith(f".{whole}")
    ]
    if len(inside) > 1:
        raise ValueError(
            f"The layer {layer[:200]} may be any of {sorted(name for _, name in inside)[:3]}: pass "
            "the part of the model that the adapter is for."
        )
    return inside[0] if inside else None


def _config(
    part: Mapping[str, Tensor], module: nn.Module, config: TLoraConfig | None
) -> TLoraConfig:
    """The config of a model's adapter, after it has been checked that it fits."""
    if is_tlora(part):
        if config is not None:
            raise ValueError(
                "The source says itself how the adapter was trained; leave config out."
            )
        _check(part, module)
        return config_from_state_dict(part)
    if config is None:
        raise ValueError(
            f"The source has {TRAINED_ALONE}: pass the config that they were trained with, as "
            "config=TLoraConfig(...)."
        )
    for layer, fields in _layers(part).items():
        check_trained(layer, fields, config)
    _check(part, module)
    return replace(config, target_modules=sorted(_layers(part)))


def _layers(part: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by their field."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in part.items():
        layer, _, part_name = name.partition(".lora_")
        layers.setdefault(layer, {})[FIELDS[f".lora_{part_name}"]] = tensor
    return layers


def _check(part: Mapping[str, Tensor], module: nn.Module) -> None:
    """Raise unless the layers' tensors can be an adapter's, and fit the model."""
    modules = dict(module.named_modules())
    for layer, fields in _layers(part).items():
        check_name(layer)
        if not {"dq", "dp"} <= fields.keys():
            raise ValueError(f"Layer {layer} has only {', '.join(sorted(fields))}.")
        fields.pop("schedule", None)
        factors = Factors(**fields)
        try:
            check_factors(factors, len(factors.dq), start_follows=True)
        except ValueError as error:
            raise ValueError(f"Layer {layer}: {error}") from None
        weight = weight_of(modules, layer)
        if weight is not None:
            check_fit(layer, factors.dq, factors.dp, weight, type(module).__name__)
