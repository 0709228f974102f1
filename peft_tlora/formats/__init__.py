"""T-LoRA files of other trainers in, files for other tools out.

`read_<format>` makes an `Adapter` of a file, `write_<format>` a file of an `Adapter`; plain LoRA is
made at one mask by `plain_lora` in between, or by `write_bands` at several.
"""

from ..weights.files import open_checkpoint
from .adapter import Adapter, AdapterLayer
from .bands import write_bands
from .base import load_base
from .facts import TrainingFacts
from .inspection import inspect_file
from .lora import write_comfyui, write_kohya, write_lora
from .official import read_official_flux, read_official_sdxl
from .own import read_diffusers, read_peft, write_diffusers, write_peft
from .plain import PlainLora, plain_lora
from .reading import format_of, read_adapter
from .state_dict import read_config, read_state_dict
from .trainers import read_lycoris, read_sd_scripts, read_takenoko

__all__ = [
    "Adapter",
    "AdapterLayer",
    "PlainLora",
    "TrainingFacts",
    "format_of",
    "inspect_file",
    "load_base",
    "open_checkpoint",
    "plain_lora",
    "read_adapter",
    "read_config",
    "read_diffusers",
    "read_lycoris",
    "read_official_flux",
    "read_official_sdxl",
    "read_peft",
    "read_sd_scripts",
    "read_state_dict",
    "read_takenoko",
    "write_bands",
    "write_comfyui",
    "write_diffusers",
    "write_kohya",
    "write_lora",
    "write_peft",
]
