"""Layers by the names that other programs have for them."""

import re
from typing import NamedTuple

from torch import Tensor, nn


class Place(NamedTuple):
    """Where a layer of diffusers is in the original model.

    Args:
        name: Name of the original layer.
        slot: Which rows of it, if it holds several layers of diffusers; else None.
        shares: The shares of the rows that its layers have.
    """

    name: str
    slot: int | None = None
    shares: tuple[int, ...] = (1,)


_QKV = (1, 1, 1)
_QKV_MLP = (1, 1, 1, 4)  # FLUX's single blocks: the MLP is four times as wide


def _attention(of: str, to: str, names: str = "to_q to_k to_v") -> dict[str, Place]:
    return {f"{of}.{name}": Place(to, i, _QKV) for i, name in enumerate(names.split())}


def _mlp(of: str, first: str, second: str) -> dict[str, Place]:
    return {f"{of}.net.0.proj": Place(first), f"{of}.net.2": Place(second)}


_ADDED = "add_q_proj add_k_proj add_v_proj"
_FLUX_DOUBLE = {
    **_attention("attn", "img_attn.qkv"),
    **_attention("attn", "txt_attn.qkv", _ADDED),
    "attn.to_out.0": Place("img_attn.proj"),
    "attn.to_add_out": Place("txt_attn.proj"),
    **_mlp("ff", "img_mlp.0", "img_mlp.2"),
    **_mlp("ff_context", "txt_mlp.0", "txt_mlp.2"),
    "norm1.linear": Place("img_mod.lin"),
    "norm1_context.linear": Place("txt_mod.lin"),
}
_FLUX_SINGLE = {
    "attn.to_q": Place("linear1", 0, _QKV_MLP),
    "attn.to_k": Place("linear1", 1, _QKV_MLP),
    "attn.to_v": Place("linear1", 2, _QKV_MLP),
    "proj_mlp": Place("linear1", 3, _QKV_MLP),
    "proj_out": Place("linear2"),
    "norm.linear": Place("modulation.lin"),
}
# without norm1_context: the last block's rows are in another order
_SD3 = {
    **_attention("attn", "x_block.attn.qkv"),
    **_attention("attn", "context_block.attn.qkv", _ADDED),
    **_attention("attn2", "x_block.attn2.qkv"),
    "attn.to_out.0": Place("x_block.attn.proj"),
    "attn.to_add_out": Place("context_block.attn.proj"),
    "attn2.to_out.0": Place("x_block.attn2.proj"),
    **_mlp("ff", "x_block.mlp.fc1", "x_block.mlp.fc2"),
    **_mlp("ff_context", "context_block.mlp.fc1", "context_block.mlp.fc2"),
    "norm1.linear": Place("x_block.adaLN_modulation.1"),
}
_WAN = {
    **{f"attn1.to_{x}": Place(f"self_attn.{x}") for x in "qkv"},
    **{f"attn2.to_{x}": Place(f"cross_attn.{x}") for x in "qkv"},
    **{f"attn2.add_{x}_proj": Place(f"cross_attn.{x}_img") for x in "kv"},
    "attn1.to_out.0": Place("self_attn.o"),
    "attn2.to_out.0": Place("cross_attn.o"),
    **_mlp("ffn", "ffn.0", "ffn.2"),
}
# family -> blocks in diffusers, in the original, and their layers
_BLOCKS = {
    "flux": [
        ("transformer_blocks", "double_blocks", _FLUX_DOUBLE),
        ("single_transformer_blocks", "single_blocks", _FLUX_SINGLE),
    ],
    "sd3": [("transformer_blocks", "joint_blocks", _SD3)],
    "wan": [("blocks", "blocks", _WAN)],
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SDXL_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
_UNET_LAYER = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(attentions|resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def original(family: str, name: str) -> Place:
    """Where a layer of diffusers is in the original model of a family.

    Raises:
        ValueError: If the original has no such layer.
    """
    if family == "sd":  # its trainers use diffusers' names
        return Place(name)
    place = _sgm(name) if family == "sdxl" else _in_blocks(family, name)
    if place is None:
        raise ValueError(
            f"Layer {name} has no name in the original {family} model that this package knows; "
            "leave it out of the adapter, or write diffusers' names with --to lora."
        )
    return place


def _in_blocks(family: str, name: str) -> Place | None:
    for ours, theirs, layers in _BLOCKS[family]:
        match = re.fullmatch(rf"{ours}\.(\d+)\.(.+)", name)
        if match and match[2] in layers:
            place = layers[match[2]]
            return place._replace(name=f"{theirs}.{match[1]}.{place.name}")
    return None


def _sgm(name: str) -> Place | None:
    """SDXL's U-Net in Stability's code: two layers a block on the way down, three on the way up."""
    if name in _SDXL_OUTSIDE:
        return Place(_SDXL_OUTSIDE[name])
    match = _UNET_LAYER.fullmatch(name)
    if match is None:
        return None
    side, block, kind, number, rest = (
        match[1],
        int(match[2] or 0),
        match[3],
        int(match[4]),
        match[5],
    )
    if kind == "resnets":
        rest = _RESNET.get(rest, rest)
    column = 1 if kind == "attentions" else 0
    if side is None:
        return Place(f"middle_block.{1 if column else 2 * number}.{rest}")
    if kind == "downsamplers":
        return Place(f"input_blocks.{3 * block + 3}.0.op")
    if kind == "upsamplers":
        return Place(f"output_blocks.{3 * block + 2}.2.conv")
    if side == "down":
        return Place(f"input_blocks.{3 * block + number + 1}.{column}.{rest}")
    return Place(f"output_blocks.{3 * block + number}.{column}.{rest}")


def underscored(base: nn.Module) -> dict[str, str]:
    """The layers of a model by their names with underscores, diffusers' and the original ones."""
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    ]
    found = {name.replace(".", "_"): name for name in names}
    for name in names:
        for place in (_sgm(name), _in_blocks("wan", name)):
            if place is not None:
                found.setdefault(place.name.replace(".", "_"), name)
    return found
