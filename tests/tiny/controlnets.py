"""ControlNets."""

import warnings

import diffusers
import torch

from . import Tiny
from .image import (
    flux,
    flux_inputs,
    qwen_image,
    qwen_image_inputs,
    sd3,
    sd3_inputs,
    z_image,
    z_image_inputs,
)
from .unets import FRAMES, MOTION_PROJECTIONS, SIZES, unet_inputs, unet_motion_inputs


def controlnet(make, inputs, frames=1, **kwargs):
    """A ControlNet that returns the tensors of its blocks, deepest first, as (batch, frames, ...).

    The test takes a list for one tensor of each sample, and the first blocks see no timestep.
    """

    def made():
        model = make()
        model.register_forward_hook(lambda module, args, output: deepest_first(output, frames))
        return model

    return Tiny(made, inputs, **kwargs)


def deepest_first(output, frames):
    if isinstance(output, torch.Tensor):
        return (output.unflatten(0, (-1, frames)),)
    parts = list(output.values() if isinstance(output, dict) else output)
    return tuple(tensor for part in parts[::-1] for tensor in deepest_first(part, frames))


def conditioned(inputs, *shape):
    """Inputs with a condition of a shape."""
    return lambda batch: {**inputs(batch), "controlnet_cond": torch.randn(batch, *shape)}


def multi(cls, make, inputs, lists=(), nets=2):
    """Several ControlNets of a maker, which get the same condition."""

    def all_inputs(batch):
        one = inputs(batch)
        return {
            **one,
            **{name: [one[name]] * 2 for name in ("controlnet_cond", *lists)},
            "conditioning_scale": [1.0, 0.5],
            "return_dict": False,
        }

    return controlnet(lambda: cls([make() for _ in range(nets)]), all_inputs)


def unet_control(cls=diffusers.ControlNetModel, **kwargs):
    return cls(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8,),
        **SIZES,
        **kwargs,
    )


unet_control_inputs = conditioned(unet_inputs, 3, 8, 8)


def union():
    return unet_control(
        diffusers.ControlNetUnionModel,
        addition_time_embed_dim=8,
        num_control_type=2,
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
    )


def union_inputs(batch):
    return {
        **unet_inputs(batch),
        "controlnet_cond": [torch.randn(batch, 3, 8, 8)],
        "control_type": torch.tensor([[0.0, 1.0]] * batch),
        "control_type_idx": [1],
    }


def sparse():
    return diffusers.SparseControlNetModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        concat_conditioning_mask=False,
        **SIZES,
    )


def control_xs():
    return diffusers.UNetControlNetXSModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        norm_num_groups=4,
        cross_attention_dim=16,
        ctrl_conditioning_embedding_out_channels=(8,),
        ctrl_block_out_channels=(8, 8),
        ctrl_max_norm_num_groups=4,
    )


def hunyuan():
    return diffusers.HunyuanDiT2DControlNetModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        transformer_num_layers=6,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=3,
        text_len_t5=2,
        use_style_cond_and_image_meta_size=False,
    )


def hunyuan_inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
        "text_embedding_mask": torch.ones(batch, 3),
        "encoder_hidden_states_t5": torch.randn(batch, 2, 16),
        "text_embedding_mask_t5": torch.ones(batch, 2),
        "controlnet_cond": torch.randn(batch, 4, 8, 8),
    }


def sd3_control():
    return diffusers.SD3ControlNetModel.from_config(sd3().config, qk_norm="rms_norm")


sd3_control_inputs = conditioned(sd3_inputs, 4, 4, 6)


def sana():
    return diffusers.SanaControlNetModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )


def sana_inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
        "controlnet_cond": torch.randn(batch, 4, 8, 8),
    }


def flux_control():
    with warnings.catch_warnings():  # diffusers warns of its own FluxPosEmbed
        warnings.simplefilter("ignore", FutureWarning)
        return diffusers.FluxControlNetModel.from_config(flux().config)


def flux_control_inputs(batch):
    return {
        **flux_inputs(batch),
        "controlnet_cond": torch.randn(batch, 6, 4),
        "controlnet_mode": torch.zeros(batch, dtype=torch.long),
    }


def qwen_image_control():
    return diffusers.QwenImageControlNetModel.from_config(qwen_image().config)


qwen_image_control_inputs = conditioned(qwen_image_inputs, 8, 16)


def z_image_control():
    control = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_in_dim=4,
        dim=16,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    control.gradient_checkpointing = False  # its forward reads what diffusers never sets
    return diffusers.ZImageControlNetModel.from_transformer(control, z_image())


def z_image_control_inputs(batch):
    inputs = z_image_inputs(batch)
    return {**inputs, "control_context": [torch.randn_like(x) for x in inputs["x"]]}


MODELS = {
    "ControlNetModel": controlnet(unet_control, unet_control_inputs),
    "ControlNetUnionModel": controlnet(union, union_inputs),
    "FluxControlNetModel": controlnet(flux_control, flux_control_inputs),
    "FluxMultiControlNetModel": multi(
        diffusers.FluxMultiControlNetModel, flux_control, flux_control_inputs, ["controlnet_mode"]
    ),
    "HunyuanDiT2DControlNetModel": controlnet(hunyuan, hunyuan_inputs),
    "HunyuanDiT2DMultiControlNetModel": multi(
        diffusers.HunyuanDiT2DMultiControlNetModel, hunyuan, hunyuan_inputs
    ),
    "MultiControlNetModel": multi(
        diffusers.MultiControlNetModel, unet_control, unet_control_inputs
    ),
    "MultiControlNetUnionModel": multi(
        diffusers.models.MultiControlNetUnionModel,
        union,
        union_inputs,
        ["control_type", "control_type_idx"],
    ),
    "QwenImageControlNetModel": controlnet(qwen_image_control, qwen_image_control_inputs),
    "QwenImageMultiControlNetModel": multi(
        diffusers.QwenImageMultiControlNetModel,
        qwen_image_control,
        qwen_image_control_inputs,
        nets=1,
    ),
    "SD3ControlNetModel": controlnet(sd3_control, sd3_control_inputs),
    "SD3MultiControlNetModel": multi(
        diffusers.SD3MultiControlNetModel, sd3_control, sd3_control_inputs
    ),
    "SanaControlNetModel": controlnet(sana, sana_inputs),
    # diffusers calls these with `input=`, which no layer of PEFT takes
    "SparseControlNetModel": controlnet(
        sparse,
        conditioned(unet_motion_inputs, 4, FRAMES, 4, 4),
        frames=FRAMES,
        exclude=MOTION_PROJECTIONS,
    ),
    "UNetControlNetXSModel": controlnet(control_xs, unet_control_inputs),
    # the embedders see the tokens of all samples in one sequence
    "ZImageControlNetModel": controlnet(
        z_image_control,
        z_image_control_inputs,
        exclude=r"((control_)?all_x_embedder|cap_embedder)\..*",
    ),
}
