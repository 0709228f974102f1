"""U-Nets, and the transformers of the early pipelines."""

import inspect

import diffusers
import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import (
    UNetFlatConditionModel,
)
from torch import nn

from ..conftest import tiny_unet
from . import Tiny

# diffusers moved their modules, so take them from the pipelines that use them
WUERSTCHEN = inspect.getmodule(diffusers.WuerstchenDecoderPipeline)
WUERSTCHEN_PRIOR = inspect.getmodule(diffusers.WuerstchenPriorPipeline)
SIZES = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}
FRAMES = 3
MOTION_PROJECTIONS = r".*\.motion_modules\.\d+\.proj_(in|out)"


def unet(cls, down, up, **kwargs):
    down, up = down.split(), up.split()
    sizes = {**SIZES, "block_out_channels": SIZES["block_out_channels"][: len(down)]}
    return cls(**{**sizes, "down_block_types": down, "up_block_types": up, **kwargs})


def unet_inputs(batch, *shape):
    return {
        "sample": torch.randn(batch, 4, *(shape or (8, 8))),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
    }


def unet_2d():
    return diffusers.UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
    )


def unet_2d_inputs(batch):
    return {"sample": torch.randn(batch, 3, 8, 8)}


def unet_3d(cls=diffusers.UNet3DConditionModel):
    return unet(cls, "CrossAttnDownBlock3D", "CrossAttnUpBlock3D", attention_head_dim=8)


def video_inputs(batch):
    return unet_inputs(batch, FRAMES, 4, 4)


def i2vgen_xl():
    return unet_3d(diffusers.I2VGenXLUNet)


def i2vgen_xl_inputs(batch):
    return {
        **video_inputs(batch),
        "fps": torch.full((batch,), 16),
        "image_latents": torch.randn(batch, 4, FRAMES, 4, 4),
        "image_embeddings": torch.randn(batch, 16),
    }


def kandinsky3():
    return diffusers.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(16, 16),
        cross_attention_dim=16,
        encoder_hid_dim=16,
    )


def kandinsky3_inputs(batch):
    return {**unet_inputs(batch), "encoder_attention_mask": torch.ones(batch, 3)}


def unet_motion():
    return unet(diffusers.UNetMotionModel, "CrossAttnDownBlockMotion", "CrossAttnUpBlockMotion")


def unet_motion_inputs(batch):
    inputs = video_inputs(batch)
    states = inputs["encoder_hidden_states"].repeat_interleave(FRAMES, dim=0)
    return {**inputs, "encoder_hidden_states": states}


def dream_lite():
    return unet(
        diffusers.DreamLiteUNetModel,
        "DreamLiteCrossAttnNoSelfAttnDownBlock2D DreamLiteCrossAttnDownBlock2D",
        "DreamLiteCrossAttnUpBlock2D DreamLiteUpBlock2D",
        attention_head_dim=2,
    )


def audio_ldm2():
    return unet(
        AudioLDM2UNet2DConditionModel,
        "CrossAttnDownBlock2D",
        "CrossAttnUpBlock2D",
        cross_attention_dim=((None, 16, 8),),
    )


def audio_ldm2_inputs(batch):
    return {**unet_inputs(batch), "encoder_hidden_states_1": torch.randn(batch, 2, 8)}


def unet_flat():
    return unet(UNetFlatConditionModel, "CrossAttnDownBlockFlat", "CrossAttnUpBlockFlat")


def unet_flat_inputs(batch):
    return unet_inputs(batch, 4, 1)


def unet_spatio_temporal():
    return diffusers.UNetSpatioTemporalConditionModel(
        in_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        block_out_channels=(64,),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
    )


def unet_spatio_temporal_inputs(batch):
    return {
        "sample": torch.randn(batch, FRAMES, 4, 4, 4),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
        "added_time_ids": torch.ones(batch, 3),
    }


def unet_1d():
    return diffusers.UNet1DModel(
        extra_in_channels=64,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
    )


def unet_1d_inputs(batch):
    return {"sample": torch.randn(batch, 2, 32)}


def stable_cascade():
    return diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=16,
        clip_seq=2,
    )


def stable_cascade_inputs(batch):
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "clip_text_pooled": torch.randn(batch, 1, 16),
        "clip_text": torch.randn(batch, 3, 16),
        "clip_img": torch.randn(batch, 1, 16),
    }


def wuerstchen_prior():
    model = WUERSTCHEN_PRIOR.WuerstchenPrior(c_in=4, c=16, c_cond=16, c_r=8, depth=2, nhead=2)
    nn.init.normal_(model.out[1].weight, std=0.02)  # it divides by 1 minus a part of its output
    return model


def wuerstchen_prior_inputs(batch):
    return {"x": torch.randn(batch, 4, 8, 8), "c": torch.randn(batch, 3, 16)}


def wuerstchen_diff_next():
    return WUERSTCHEN.WuerstchenDiffNeXt(
        c_r=8,
        c_cond=16,
        c_hidden=[16, 16],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=4,
        clip_embd=16,
    )


def wuerstchen_diff_next_inputs(batch):
    return {
        "x": torch.randn(batch, 4, 8, 8),
        "effnet": torch.randn(batch, 4, 2, 2),
        "clip": torch.randn(batch, 3, 16),
    }


def uni_diffuser():
    return diffusers.UniDiffuserModel(
        text_dim=16,
        clip_img_dim=16,
        num_text_tokens=3,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=4,
        patch_size=2,
        use_timestep_embedding=True,
    )


def uni_diffuser_inputs(batch):
    return {
        "latent_image_embeds": torch.randn(batch, 4, 4, 4),
        "image_embeds": torch.randn(batch, 1, 16),
        "prompt_embeds": torch.randn(batch, 3, 16),
    }


def uvit():
    return diffusers.UVit2DModel(
        hidden_size=16,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=16,
        vocab_size=12,
        codebook_size=11,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )


def uvit_inputs(batch):
    return {
        "input_ids": torch.randint(12, (batch, 4, 4)),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
        "pooled_text_emb": torch.randn(batch, 16),
        "micro_conds": torch.ones(batch, 5),
    }


def vq_diffusion():
    return diffusers.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=2,
        num_vector_embeds=9,
        cross_attention_dim=16,
        norm_type="ada_norm",
        num_embeds_ada_norm=101,
    )


def vq_diffusion_inputs(batch):
    return {
        "hidden_states": torch.randint(9, (batch, 4)),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
        "return_dict": False,  # its output class warns of itself
    }


def prior_transformer():
    return diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=3,
    )


def prior_transformer_inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 16),
        "proj_embedding": torch.randn(batch, 16),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
    }


def t5_film():
    return diffusers.T5FilmDecoder(
        input_dims=8, targets_length=4, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=32
    )


def t5_film_inputs(batch):
    return {
        "encodings_and_masks": [(torch.randn(batch, 3, 16), torch.ones(batch, 3))],
        "decoder_input_tokens": torch.randn(batch, 4, 8),
    }


MODELS = {
    "AudioLDM2UNet2DConditionModel": Tiny(audio_ldm2, audio_ldm2_inputs),
    "DreamLiteUNetModel": Tiny(dream_lite, unet_inputs),
    "I2VGenXLUNet": Tiny(i2vgen_xl, i2vgen_xl_inputs),
    "Kandinsky3UNet": Tiny(kandinsky3, kandinsky3_inputs),
    "PriorTransformer": Tiny(prior_transformer, prior_transformer_inputs),
    "StableCascadeUNet": Tiny(stable_cascade, stable_cascade_inputs),
    "T5FilmDecoder": Tiny(t5_film, t5_film_inputs),
    # its AdaLayerNorm takes one timestep for the whole batch
    "Transformer2DModel": Tiny(
        vq_diffusion,
        vq_diffusion_inputs,
        lambda t: {"timestep": t[0].long()},
        own_masks=False,
    ),
    "UNet1DModel": Tiny(unet_1d, unet_1d_inputs),
    "UNet2DConditionModel": Tiny(tiny_unet, unet_inputs),
    "UNet2DModel": Tiny(unet_2d, unet_2d_inputs),
    "UNet3DConditionModel": Tiny(unet_3d, video_inputs),
    "UNetFlatConditionModel": Tiny(unet_flat, unet_flat_inputs),
    # diffusers calls these with `input=`, which no layer of PEFT takes
    "UNetMotionModel": Tiny(unet_motion, unet_motion_inputs, exclude=MOTION_PROJECTIONS),
    "UNetSpatioTemporalConditionModel": Tiny(unet_spatio_temporal, unet_spatio_temporal_inputs),
    "UniDiffuserModel": Tiny(
        uni_diffuser, uni_diffuser_inputs, lambda t: {"timestep_img": t, "timestep_text": t}
    ),
    "WuerstchenDiffNeXt": Tiny(wuerstchen_diff_next, wuerstchen_diff_next_inputs),
    "WuerstchenPrior": Tiny(wuerstchen_prior, wuerstchen_prior_inputs),
}
