"""T-LoRA files of other trainers in, files for other tools out.

`read_adapter` makes an `Adapter` of a file of any known format, `write_<format>` a file of it.
Plain LoRA is made at one mask by `plain_lora` in between, or by `write_bands` at several.
"""

from ..weights.files import open_file
from .adapter import Adapter, AdapterLayer
from .bands import write_bands
from .base import load_base
from .facts import TrainingFacts
from .inspection import inspect_file
from .lora import write_lora
from .own import write_diffusers, write_peft
from .plain import PlainLora, plain_lora
from .reading import format_of, read_adapter
from .state_dict import read_config

__all__ = [
    "Adapter",
    "AdapterLayer",
    "PlainLora",
    "TrainingFacts",
    "format_of",
    "inspect_file",
    "load_base",
    "open_file",
    "plain_lora",
    "read_adapter",
    "read_config",
    "write_bands",
    "write_diffusers",
    "write_lora",
    "write_peft",
]
