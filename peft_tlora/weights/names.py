"""Names of an adapter's tensors, as PEFT and diffusers write them, and of models."""

import re
from collections.abc import Mapping

FIELDS = {
    ".lora_A.weight": "dq",
    ".lora_B.weight": "dp",
    ".lora_lambda.weight": "dlam",
    ".lora_A_init.weight": "q0",
    ".lora_B_init.weight": "p0",
    ".lora_lambda_init.weight": "lam0",
    ".lora_schedule.weight": "schedule",
}
# what diffusers' conversions of the state dicts of U-Nets and text encoders make of these names
_DIFFUSERS_FIELDS = {
    name.replace("lora_A", f"{style}.down").replace("lora_B", f"{style}.up"): field
    for style in ("lora", "lora_linear_layer")
    for name, field in FIELDS.items()
}
OWN_FIELDS = {**FIELDS, **_DIFFUSERS_FIELDS}
# PEFT's name of a tensor, in a model's own state dict with the adapter's name in it
NAME = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_(?:A|B|lambda)(?:_init)?|lora_schedule)"
    r"(?:\.(?P<adapter>.+))?\.weight"
)
# what diffusers' pipelines call their models that take adapters
COMPONENT = re.compile(
    r"unet|prior|connectors|text_conditioner|(?:transformer|text_encoder)(?:_\d|_ref)?"
)
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embed)")
_TEXT_ENCODER = re.compile(r"(text_model|encoder)\.")  # CLIP, T5
_PART = re.compile(r"(?!__)[A-Za-z0-9_-]+")


def parsed(name: str) -> re.Match[str] | None:
    """The match of `NAME` for a name of PEFT or diffusers; None if it's no part of an adapter."""
    endings = {field: ending for ending, field in FIELDS.items()}
    for ending, field in _DIFFUSERS_FIELDS.items():
        if name.endswith(ending):
            name = name.removesuffix(ending) + endings[field]
            break
    return NAME.fullmatch(name)


def component_of(names: Mapping[str, object]) -> str:
    """The name in diffusers' pipelines of the model with such layers."""
    if all(_TEXT_ENCODER.match(name) for name in names):
        return "text_encoder"
    return "unet" if all(_UNET.match(name) for name in names) else "transformer"


def check_name(name: str) -> None:
    """Raise unless a name is a dotted path of plain words."""
    if not all(_PART.fullmatch(part) for part in name.split(".")):
        raise ValueError(f"{name[:200]!r} is not the name of a layer.")
