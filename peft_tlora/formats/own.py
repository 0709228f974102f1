"""This package's own formats: PEFT's folder and diffusers' single file."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..weights.files import AdapterFile, replaced_together, write_tensors
from ..weights.names import COMPONENT, OWN_FIELDS, component_of
from ..weights.state_dict import config_from_state_dict, is_tlora
from .adapter import Adapter
from .facts import Given
from .tensors import layers_of_own, own_tensors

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FILE = "pytorch_lora_weights.safetensors"
_PREFIX = "base_model.model."


def is_peft(file: AdapterFile) -> bool:
    """Whether a file is the T-LoRA adapter of PEFT's folder."""
    return is_tlora(file.tensors) and all(name.startswith(_PREFIX) for name in file.tensors)


def is_diffusers(file: AdapterFile) -> bool:
    """Whether a file is diffusers' with a T-LoRA adapter in it."""
    return is_tlora(file.tensors) and all(
        name.endswith(tuple(OWN_FIELDS)) and COMPONENT.fullmatch(name.partition(".")[0])
        for name in file.tensors
    )


def read_peft(file: AdapterFile, given: Given) -> Adapter:
    """The adapter in the folder that PEFT's `save_pretrained` writes."""
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in file.tensors.items()}
    layers = layers_of_own(tensors, "PEFT with T-LoRA")
    return Adapter(given.component or component_of(layers), layers)


def write_peft(adapter: Adapter, destination: str | os.PathLike[str]) -> Path:
    """Write the folder that PEFT's `from_pretrained` and `load_adapter` read.

    Dropout is not in an `Adapter` and takes its default in the folder's config. So does how a layer
    was initialised if it has no recipe; its start is in the weights then. Config and weights are
    written whole before either takes the place of an old one, and the old config goes first: a
    crash at that moment leaves weights that `read_peft` reads, without the config that PEFT asks
    for, but no config of other weights.

    Args:
        adapter: The adapter.
        destination: The folder; files of the same names in it are replaced.

    Returns:
        The folder.
    """
    folder = Path(destination)
    config = config_from_state_dict(own_tensors(adapter.layers, ""))
    config.inference_mode = True
    with replaced_together(folder, _CONFIG) as new:
        config.save_pretrained(str(new))
        write_tensors(new / _WEIGHTS, own_tensors(adapter.layers, _PREFIX))
    return folder


def read_diffusers(file: AdapterFile, given: Given) -> Adapter:
    """One of the adapters in the file that diffusers' `save_lora_weights` writes.

    Its notes count the tensors of the others.

    Raises:
        ValueError: If there are several and none was chosen.
    """
    counts = Counter(name.partition(".")[0] for name in file.tensors)
    component, notes = choose_component(file.path, counts, given.component)
    prefix = f"{component}."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in file.tensors.items()
        if name.startswith(prefix)
    }
    return Adapter(component, layers_of_own(tensors, "diffusers with T-LoRA"), notes)


def choose_component(
    path: Path, counts: Mapping[str, int], component: str | None
) -> tuple[str, tuple[str, ...]]:
    """Which of a pipeline's models in a file is read, by their numbers of tensors, and notes.

    Raises:
        ValueError: If there is no such model, or none was asked for and there are several.
    """
    found = sorted(counts)
    if component is None and len(found) > 1:
        raise ValueError(
            f"{path} has adapters for {', '.join(found)[:200]}: choose one with component."
        )
    component = component or found[0]
    if component not in found:
        raise ValueError(f"{path} has no adapter for {component}, only for {found}.")
    notes = tuple(
        f"{count} tensors of {other} are left out; --component {other} reads them."
        for other, count in counts.items()
        if other != component
    )
    return component, notes


def write_diffusers(adapter: Adapter, destination: str | os.PathLike[str]) -> Path:
    """Write the file that the `load_lora_weights` of diffusers' pipelines reads.

    Args:
        adapter: The adapter.
        destination: The file, or a folder for pytorch_lora_weights.safetensors.

    Returns:
        The file.
    """
    path = as_file(destination)
    write_tensors(path, own_tensors(adapter.layers, f"{adapter.component}."))
    return path


def as_file(destination: str | os.PathLike[str], name: str = _FILE) -> Path:
    """The file to write: itself if it ends so, or that name in a folder."""
    path = Path(destination)
    return path if path.suffix == ".safetensors" else path / name
