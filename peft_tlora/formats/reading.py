"""Which format a file has, and the adapter in it."""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..config import TLoraConfig
from ..weights.files import AdapterFile, open_file
from .adapter import Adapter
from .facts import Given, TrainingFacts
from .official import (
    is_official_flux,
    is_official_sdxl,
    read_official_flux,
    read_official_sdxl,
)
from .own import is_diffusers, is_peft, read_diffusers, read_peft
from .state_dict import is_state_dict, read_state_dict
from .trainers import (
    is_lycoris,
    is_sd_scripts,
    is_takenoko,
    read_lycoris,
    read_sd_scripts,
    read_takenoko,
)


class Format(NamedTuple):
    """A format that can be read.

    Args:
        title: What it is, in words.
        matches: Whether an opened file has it.
        read: Its reader.
        takes: Which of the arguments of `read_adapter` mean something for it, beside `base`.
    """

    title: str
    matches: Callable[[AdapterFile], bool]
    read: Callable[[AdapterFile, Given], Adapter]
    takes: tuple[str, ...]


FORMATS = {
    "peft": Format("folder of PEFT", is_peft, read_peft, ("component",)),
    "diffusers": Format("file of diffusers", is_diffusers, read_diffusers, ("component",)),
    "state_dict": Format(
        "state dict of a host", is_state_dict, read_state_dict, ("component", "config")
    ),
    "official_sdxl": Format(
        "authors' SDXL trainer", is_official_sdxl, read_official_sdxl, ("facts", "hparams")
    ),
    "official_flux": Format(
        "authors' FLUX trainer", is_official_flux, read_official_flux, ("facts", "hparams")
    ),
    "sd_scripts": Format("sd-scripts fork", is_sd_scripts, read_sd_scripts, ("facts",)),
    "takenoko": Format("Takenoko", is_takenoko, read_takenoko, ("facts",)),
    "lycoris": Format("LyCORIS tlora", is_lycoris, read_lycoris, ("facts",)),
}


_PLAIN = re.compile(r"(lora_(A|B|down|up)|lora\.(down|up))(\.[^.]+)?\.weight$|\.alpha$")


def format_of(file: AdapterFile) -> str:
    """The format of an opened file, a key of `FORMATS`.

    Raises:
        ValueError: If it is none of them.
    """
    found = [name for name, format in FORMATS.items() if format.matches(file)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(repr(name[-80:]) for name in list(file.tensors)[:3])
    if file.tensors and all(_PLAIN.search(name) for name in file.tensors):
        raise ValueError(
            f"{file.path} is plain LoRA: its {len(file.tensors)} tensors, such as {names}, are "
            "LoRA's alone, and nothing in it tells of T-LoRA."
        )
    raise ValueError(
        f"{file.path} is no T-LoRA file of a known format ({', '.join(FORMATS)}), or a mixture of "
        f"several: it has {len(file.tensors)} tensors, such as {names or 'none'}."
    )


def read_adapter(
    source: str | os.PathLike[str] | AdapterFile,
    *,
    facts: TrainingFacts | None = None,
    base: nn.Module | None = None,
    component: str | None = None,
    hparams: str | os.PathLike[str] | None = None,
    config: TLoraConfig | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """Read a T-LoRA file of any known format.

    Args:
        source: A file, a folder with one, or an opened file.
        facts: What the file doesn't say about its training.
        base: The base model, where the format needs it.
        component: Which model of a pipeline, where a file has adapters for several.
        hparams: The hparams.yml of the authors' trainers, if it isn't beside the file.
        config: The config that the adapter was trained with, for a file with its trained tensors
            alone.
        allow_pickle: Whether a pickled file is read, without running its code.

    Raises:
        ValueError: If the file is damaged, unknown or mixed, or doesn't say enough, or an argument
            has no meaning for its format.
    """
    if not isinstance(source, AdapterFile):
        source = open_file(source, allow_pickle=allow_pickle)
    format = FORMATS[format_of(source)]
    given = Given(facts or TrainingFacts(), base, component, hparams, config)
    known = {"base", *format.takes} | set(given.facts.known() if "facts" in format.takes else ())
    unused = [name for name in given.names() if name not in known]
    if unused:
        raise ValueError(
            f"{', '.join(unused)} was given, but {source.path.name} is of the {format.title}, "
            "which has no use for it; leave it out."
        )
    adapter = format.read(source, given)
    if base is not None:
        adapter.check_fits(base)
    return adapter
