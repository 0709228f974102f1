"""The base model of an adapter, for its layers' names alone or with its weights."""

import os
from pathlib import Path

import diffusers
import torch
from torch import nn

from ..weights.files import read_json

_PARTS = ("unet", "transformer")


def load_base(source: str | os.PathLike[str], *, weights: bool) -> nn.Module:
    """Load the denoiser in a folder of diffusers.

    Args:
        source: The folder of a pipeline or of its denoiser.
        weights: Whether its weights are loaded; its layers' names and shapes are there without.

    Raises:
        ValueError: If the folder holds no denoiser of diffusers.
        OSError: If its weights are to be loaded and aren't there as safetensors.
    """
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        folder = next((folder / part for part in _PARTS if (folder / part).is_dir()), folder)
    config = read_json(folder / "config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(f"{folder / 'config.json'} names no model of diffusers, got {name!r}.")
    if weights:
        return cls.from_pretrained(folder, use_safetensors=True)  # or it would unpickle
    with torch.device("meta"):
        return cls.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]
