"""Plain LoRA files of one mask, with the names of diffusers, kohya's trainers and ComfyUI."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor

from ..weights.files import write_tensors
from .families import FAMILIES, UNETS
from .names import check_comfyui, original
from .own import as_file
from .plain import PlainLora, fused


def write_lora(lora: PlainLora, destination: str | os.PathLike[str]) -> Path:
    """Write a file with diffusers' names, which diffusers and its kin read.

    Args:
        lora: The LoRA, of `plain_lora`.
        destination: The file, or a folder for pytorch_lora_weights.safetensors.

    Returns:
        The file.
    """
    return _write(destination, _pairs(lora.layers, f"{lora.component}."))


def write_kohya(
    lora: PlainLora, destination: str | os.PathLike[str], *, family: str | None
) -> Path:
    """Write a file with the names of kohya's sd-scripts and musubi-tuner.

    They name layers as the original model does, which has some of diffusers' layers as one: those
    get the ranks of all their parts.

    Args:
        lora: The LoRA, of `plain_lora`.
        destination: The file, or a folder for pytorch_lora_weights.safetensors.
        family: Family of the base model, one of `FAMILIES`.

    Returns:
        The file.

    Raises:
        ValueError: If the family is unknown, or a layer has no name there.
    """
    known = _known(lora, family)
    places = {name: original(known, name) for name in lora.layers}
    return _write(destination, _underscored(fused(lora.layers, places)))


def write_comfyui(
    lora: PlainLora, destination: str | os.PathLike[str], *, family: str | None
) -> Path:
    """Write a file with names that ComfyUI's LoRA loaders know.

    Args:
        lora: The LoRA, of `plain_lora`.
        destination: The file, or a folder for pytorch_lora_weights.safetensors.
        family: Family of the base model, one of `FAMILIES`.

    Returns:
        The file.

    Raises:
        ValueError: If the family is unknown, or a layer has no name there.
    """
    known = _known(lora, family)
    for name in lora.layers:
        check_comfyui(known, name)
    if known in UNETS:  # ComfyUI knows diffusers' names of U-Nets
        return _write(destination, _underscored(lora.layers))
    if known == "wan":
        places = {name: original(known, name) for name in lora.layers}
        return _write(destination, _pairs(fused(lora.layers, places), "diffusion_model."))
    return _write(destination, _pairs(lora.layers, "transformer."))


LORA_WRITERS: dict[str, Callable[..., Path]] = {
    "lora": lambda lora, destination, family: write_lora(lora, destination),
    "kohya": write_kohya,
    "comfyui": write_comfyui,
}


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


def _write(destination: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> Path:
    path = as_file(destination)
    write_tensors(path, tensors)
    return path
