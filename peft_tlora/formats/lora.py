"""Plain LoRA files of one mask, with the names of diffusers, kohya's trainers and ComfyUI."""

import os
from collections.abc import Mapping
from pathlib import Path

from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor

from ..schedule import check_choice
from ..weights.files import write_tensors
from .families import FAMILIES, UNETS
from .names import check_comfyui, original
from .own import as_file
from .plain import PlainLora, fused

LORA_NAMES = ("lora", "kohya", "comfyui")


def write_lora(
    lora: PlainLora,
    destination: str | os.PathLike[str],
    names: str = "lora",
    *,
    family: str | None = None,
) -> Path:
    """Write a file with one of `LORA_NAMES`.

    Args:
        lora: The LoRA, of `plain_lora`.
        destination: The file, or a folder for pytorch_lora_weights.safetensors.
        names: "lora", which diffusers and its kin read; "kohya" for sd-scripts and musubi-tuner,
            who name layers as the original model does, which has some of diffusers' layers as one,
            with the ranks of all its parts; "comfyui" for ComfyUI's loaders.
        family: Family of the base model, one of `FAMILIES`, for the last two.

    Returns:
        The file.

    Raises:
        ValueError: If the family is needed and unknown, or a layer has no name there.
    """
    path = as_file(destination)
    write_tensors(path, _named(lora, names, family))
    return path


def _named(lora: PlainLora, names: str, family: str | None) -> dict[str, Tensor]:
    check_choice(names, LORA_NAMES, "names")
    if names == "lora":
        return _pairs(lora.layers, f"{lora.component}.")
    known = _known(lora, family)
    if names == "comfyui":
        for name in lora.layers:
            check_comfyui(known, name)
        if known in UNETS:  # ComfyUI knows diffusers' names of U-Nets
            return _underscored(lora.layers)
        if known != "wan":
            return _pairs(lora.layers, "transformer.")
    layers = fused(lora.layers, {name: original(known, name) for name in lora.layers})
    return _underscored(layers) if names == "kohya" else _pairs(layers, "diffusion_model.")


def _known(lora: PlainLora, family: str | None) -> str:
    if lora.component not in ("unet", "transformer"):
        raise ValueError(
            f"The adapter is one of {lora.component}; these names are for denoisers only. Write "
            "diffusers' names with --to lora."
        )
    if family not in FAMILIES:
        raise ValueError(
            f"The names in this format depend on the family of the base model, which must be one "
            f"of {list(FAMILIES)}, got {family}: pass family=... (--family), or write diffusers' "
            "names with --to lora."
        )
    return family


def _pairs(layers: Mapping[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in layers.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = down
        tensors[f"{prefix}{name}.lora_B.weight"] = up
    return tensors


def _underscored(layers: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return convert_state_dict_to_kohya(_pairs(layers, "unet."))  # adds alpha = rank
