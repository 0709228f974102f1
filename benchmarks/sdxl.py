"""SDXL's U-Net: at full size, scaled to a CPU, and the shapes of its attention layers."""

from collections import Counter

import torch
from diffusers import UNet2DConditionModel
from measure import device
from torch import nn

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
_FULL = {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "heads": (5, 10, 20)}
# half the width, with half as many tokens for each channel
_SCALED = {"block_out_channels": (160, 320, 640), "cross_attention_dim": 1024, "heads": (2, 5, 10)}


def unet(full: bool) -> UNet2DConditionModel:
    """The U-Net of SDXL with random weights; scaled down it has 1 and 2 blocks for 2 and 10."""
    config = _FULL if full else _SCALED
    with device():  # the host would take minutes for the full size
        return _unet(config, full)


def _unet(config: dict, full: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128 if full else 64,
        block_out_channels=config["block_out_channels"],
        cross_attention_dim=config["cross_attention_dim"],
        attention_head_dim=config["heads"],
        transformer_layers_per_block=(1, 2, 10) if full else (1, 1, 2),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def without_weights() -> UNet2DConditionModel:
    """The U-Net at full size on the meta device, its linear layers with one zero each."""
    with torch.device("meta"):
        model = _unet(_FULL, full=True)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            weight = torch.zeros(1).expand(layer.weight.shape)
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def inputs(model: UNet2DConditionModel, batch: int, dtype: torch.dtype) -> dict[str, object]:
    """Random arguments of a forward, without the timestep."""
    device = model.device
    size, width = model.config["sample_size"], model.config["cross_attention_dim"]
    return {
        "sample": torch.randn(batch, 4, size, size, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 77, width, device=device, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 1280, device=device, dtype=dtype),
            "time_ids": torch.ones(batch, 6, device=device, dtype=dtype),
        },
    }


def attention_shapes() -> Counter[tuple[int, int]]:
    """(out, in) of to_q, to_k, to_v and to_out.0, with their number, at full size."""
    shapes: Counter[tuple[int, int]] = Counter()
    # transformer blocks of each width: 2 x 2 down and 3 x 2 up; 2 x 10 down, 10 mid and 3 x 10 up
    for width, blocks in ((640, 10), (1280, 60)):
        shapes[width, width] += 6 * blocks  # self-attention, and q and out of cross-attention
        shapes[width, 2048] += 2 * blocks  # k and v of the text
    return shapes
