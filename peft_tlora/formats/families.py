"""Families of base models, told from the names and shapes of an adapter's layers."""

import re
from collections.abc import Mapping

from ..weights.names import component_of
from .adapter import AdapterLayer

UNETS = ("sd", "sdxl")
FAMILIES = (*UNETS, "sd3", "flux", "wan")
_WAN = re.compile(r"blocks\.\d+\.(attn1|attn2|ffn)\.")
_SD3 = re.compile(r"transformer_blocks\.\d+\.(attn|attn2|ff|ff_context|norm1)\.")
# width of the text embeddings; SD 2 has the names of SD 1 in all programs
_CROSS_ATTENTION = {768: "sd", 1024: "sd", 2048: "sdxl"}


def family_of(layers: Mapping[str, AdapterLayer]) -> str | None:
    """The family of the base model, one of `FAMILIES`, or None if it can't be told.

    A U-Net is told by the width of the text embeddings. Transformers are told by the names of their
    layers; where two families share them, by how they count time. A model of the same architecture
    under another name counts as the family.
    """
    if component_of(layers) == "unet":
        if any("temporal" in name or "motion" in name for name in layers):
            return None  # video models made of SD's layers and others
        widths = {
            layer.factors.dq.shape[1]
            for name, layer in layers.items()
            if name.endswith(("attn2.to_k", "attn2.to_v"))
        }
        return _CROSS_ATTENTION.get(widths.pop()) if len(widths) == 1 else None
    to_1 = {layer.schedule.num_train_timesteps for layer in layers.values()} == {1.0}
    if all(_WAN.match(name) for name in layers):
        return "wan"
    if any(name.startswith("single_transformer_blocks.") for name in layers):
        return "flux" if to_1 else None  # HunyuanVideo has the same names and counts to 1000
    if all(_SD3.match(name) for name in layers):
        return None if to_1 else "sd3"  # Qwen-Image counts to 1
    return None
