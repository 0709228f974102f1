"""Transformers that make images."""

import inspect
import warnings
from functools import partial

import diffusers
import torch
from torch import nn

from . import Tiny

# diffusers 0.36 doesn't have it, and asks for the length of each text
QWEN_HAS_ZERO_COND_T = (
    "zero_cond_t" in inspect.signature(diffusers.QwenImageTransformer2DModel).parameters
)


def image_text_inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 4, 4, 6),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
    }


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=6,
        num_embeds_ada_norm=10,
    )


def dit_inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 4, 6, 6),
        "class_labels": torch.randint(10, (batch,)),
    }


def hunyuan_dit():
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=8,
        pooled_projection_dim=12,
        text_len=3,
        text_len_t5=5,
    )


def hunyuan_dit_inputs(batch):
    return image_text_inputs(batch) | {
        "text_embedding_mask": torch.ones(batch, 3),
        "encoder_hidden_states_t5": torch.randn(batch, 5, 8),
        "text_embedding_mask_t5": torch.ones(batch, 5),
        "image_meta_size": torch.randn(batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
    }


def pixart():
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=24,
        sample_size=8,
        use_additional_conditions=True,
        caption_channels=16,
    )


def pixart_inputs(batch):
    sizes = {"resolution": torch.randn(batch, 2), "aspect_ratio": torch.randn(batch, 1)}
    return image_text_inputs(batch) | {"added_cond_kwargs": sizes}


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )


def sd3_inputs(batch):
    return image_text_inputs(batch) | {"pooled_projections": torch.randn(batch, 16)}


def aura_flow():
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )


def prx():
    return diffusers.PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=16,
        hidden_size=24,
        mlp_ratio=2.0,
        num_heads=3,
        depth=1,
        axes_dim=[4, 4],
    )


def sana():
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
    )


def flux_like(name, **kwargs):
    config = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (2, 2, 4),
    }
    return getattr(diffusers, name)(**{**config, **kwargs})


def flux_like_inputs(batch, axes=3):
    return {
        "hidden_states": torch.randn(batch, 6, 4),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
        "img_ids": torch.zeros(6, axes),
        "txt_ids": torch.zeros(3, axes),
    }


def flux():
    return flux_like("FluxTransformer2DModel", pooled_projection_dim=16)


def flux_inputs(batch):
    return flux_like_inputs(batch) | {"pooled_projections": torch.randn(batch, 16)}


def bria_fibo_inputs(batch):
    layers = [torch.randn(batch, 3, 12) for _ in range(2)]
    return flux_like_inputs(batch) | {"text_encoder_layers": layers}


def chroma():
    with warnings.catch_warnings():  # it uses what diffusers itself deprecates
        warnings.simplefilter("ignore", FutureWarning)
        return flux_like(
            "ChromaTransformer2DModel",
            approximator_num_channels=8,
            approximator_hidden_dim=12,
            approximator_layers=1,
        )


def flux2_inputs(batch):
    return flux_like_inputs(batch, axes=4) | {"guidance": torch.ones(batch)}


def flux3_inputs(batch):
    return flux_like_inputs(batch, axes=4) | {
        "image_cond_hidden_states": torch.randn(batch, 5, 12),
        "image_cond_ids": torch.zeros(5, 4),
    }


def bria_fibo2():
    return diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        axes_dims=(4, 4, 4),
        axes_lens=(16, 16, 16),
    )


def bria_fibo2_inputs(batch):
    return image_text_inputs(batch) | {"encoder_hidden_states": torch.randn(batch, 2, 3, 16)}


def cogview(name, **kwargs):
    return getattr(diffusers, name)(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=12,
        condition_dim=10,
        **kwargs,
    )


def cogview_inputs(batch):
    sizes = ("original_size", "target_size", "crop_coords")
    return image_text_inputs(batch) | {name: torch.randn(batch, 2) for name in sizes}


def glm_image_inputs(batch):
    return image_text_inputs(batch) | {
        "target_size": torch.randn(batch, 2),
        "crop_coords": torch.randn(batch, 2),
        "prior_token_id": torch.randint(10, (batch, 6)),
        "prior_token_drop": torch.zeros(batch, 6, dtype=torch.bool),
    }


def ernie_image():
    return diffusers.ErnieImageTransformer2DModel(
        hidden_size=24,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=20,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        text_in_dim=16,
        rope_axes_dim=(4, 4, 4),
    )


def ernie_image_inputs(batch):
    # an even number of tokens, so that they could be taken for the batch
    return {
        "hidden_states": torch.randn(batch, 4, 4, 6),
        "text_bth": torch.randn(batch, 4, 16),
        "text_lens": torch.full((batch,), 4),
    }


def hidream():
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[12, 20],
        text_emb_dim=10,
        num_routed_experts=3,
        axes_dims_rope=(4, 2, 2),
        llama_layers=[0, 1],
    )


def hidream_inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 4, 4, 4),
        "encoder_hidden_states_t5": torch.randn(batch, 5, 12),
        "encoder_hidden_states_llama3": torch.randn(2, batch, 3, 20),
        "pooled_embeds": torch.randn(batch, 10),
    }


def hunyuan_image():
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(2, 2),
        text_embed_dim=16,
        text_embed_2_dim=12,
        rope_axes_dim=(4, 4),
    )


def hunyuan_image_inputs(batch):
    return image_text_inputs(batch) | {
        "encoder_attention_mask": torch.ones(batch, 3),
        "encoder_hidden_states_2": torch.randn(batch, 5, 12),
        "encoder_attention_mask_2": torch.ones(batch, 5),
    }


def joy_image(name):
    return getattr(diffusers, name)(
        in_channels=4,
        hidden_size=24,
        num_attention_heads=2,
        text_dim=16,
        num_layers=2,
        rope_dim_list=[4, 4, 4],
    )


def joy_image_inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 3, 4, 1, 4, 6),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
    }


def joy_image_plus_inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 10, 4, 1, 2, 2),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
        "encoder_hidden_states_mask": torch.ones(batch, 3),
        "shape_list": [[(1, 2, 3), (1, 2, 2)]] * batch,
    }


def krea2():
    return diffusers.Krea2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=20,
        timestep_embed_dim=10,
        text_hidden_dim=12,
        num_text_layers=5,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=14,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )


def krea2_inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 6, 4),
        "encoder_hidden_states": torch.randn(batch, 3, 5, 12),
        "position_ids": torch.zeros(9, 3),
        "encoder_attention_mask": torch.ones(batch, 3, dtype=torch.bool),
    }


def qwen_like(name, **kwargs):
    return getattr(diffusers, name)(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        **kwargs,
    )


def qwen_image(**kwargs):
    return qwen_like("QwenImageTransformer2DModel", joint_attention_dim=16, **kwargs)


def qwen_image_inputs(batch):
    lengths = {} if QWEN_HAS_ZERO_COND_T else {"txt_seq_lens": [3] * batch}
    return {
        **lengths,
        "hidden_states": torch.randn(batch, 8, 16),
        "encoder_hidden_states": torch.randn(batch, 3, 16),
        "encoder_hidden_states_mask": torch.ones(batch, 3, dtype=torch.bool),
        "img_shapes": [[(1, 2, 4)]] * batch,
    }


def qwen_image21_inputs(batch):
    slots = torch.tensor([False] * 3 + [True] * 2)  # one for four tokens of the image
    return qwen_image_inputs(batch) | {"img_mask": slots.repeat(batch, 1)}


def nucleus_moe():
    model = qwen_like(
        "NucleusMoEImageTransformer2DModel",
        joint_attention_dim=16,
        mlp_ratio=6.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=20,
        capacity_factors=2.0,
    )
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # it leaves them uninitialised
            nn.init.normal_(parameter, std=0.2)
    return model


def lumina_next():
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=4,
        cross_attention_dim=16,
    )
    nn.init.zeros_(model.pad_token)  # it leaves it uninitialised
    return model


def lumina_next_inputs(batch):
    return image_text_inputs(batch) | {
        "encoder_mask": torch.ones(batch, 3),
        "image_rotary_emb": torch.ones(2, 3, 4, dtype=torch.complex64),
        "cross_attention_kwargs": {},
    }


def lumina2():
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )


def lumina2_inputs(batch):
    return image_text_inputs(batch) | {
        "encoder_attention_mask": torch.ones(batch, 3, dtype=torch.bool)
    }


def ideogram4():
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=4,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        intermediate_size=20,
        adaln_dim=10,
        llm_features_dim=16,
        mrope_section=(2, 2, 2),
    )


def ideogram4_inputs(batch):
    roles = torch.tensor([3] * 3 + [2] * 6)  # text, then image
    return {
        "hidden_states": torch.randn(batch, 9, 4),
        "encoder_hidden_states": torch.randn(batch, 9, 16),
        "position_ids": torch.zeros(batch, 9, 3),
        "segment_ids": torch.ones(batch, 9),
        "indicator": roles.repeat(batch, 1),
    }


def omnigen():
    return diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=20,
        num_layers=1,
        pad_token_id=0,
        vocab_size=10,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
        pos_embed_max_size=8,
        time_step_dim=12,
    )


def omnigen_inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 4, 4, 6),
        "input_ids": torch.randint(10, (batch, 3)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(batch, 10, 10),
        "position_ids": torch.arange(10).repeat(batch, 1),
    }


def z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 32, 32],
    )
    # it leaves its padding tokens uninitialised
    nn.init.zeros_(model.x_pad_token)
    nn.init.zeros_(model.cap_pad_token)
    return model


def z_image_inputs(batch):
    return {
        "x": [torch.randn(4, 1, 8, 8) for _ in range(batch)],
        "cap_feats": [torch.randn(3, 16) for _ in range(batch)],
    }


MODELS = {
    "AuraFlowTransformer2DModel": Tiny(aura_flow, image_text_inputs),
    "BriaFibo2Transformer2DModel": Tiny(bria_fibo2, bria_fibo2_inputs),
    "BriaFiboTransformer2DModel": Tiny(
        partial(flux_like, "BriaFiboTransformer2DModel", text_encoder_dim=12), bria_fibo_inputs
    ),
    "BriaTransformer2DModel": Tiny(partial(flux_like, "BriaTransformer2DModel"), flux_like_inputs),
    "ChromaTransformer2DModel": Tiny(chroma, flux_like_inputs),
    "CogView3PlusTransformer2DModel": Tiny(
        partial(cogview, "CogView3PlusTransformer2DModel", pos_embed_max_size=8), cogview_inputs
    ),
    "CogView4Transformer2DModel": Tiny(
        partial(cogview, "CogView4Transformer2DModel", rope_axes_dim=(8, 8)), cogview_inputs
    ),
    "DiTTransformer2DModel": Tiny(dit, dit_inputs),
    "ErnieImageTransformer2DModel": Tiny(ernie_image, ernie_image_inputs),
    "Flux2Transformer2DModel": Tiny(
        partial(flux_like, "Flux2Transformer2DModel", axes_dims_rope=(2, 2, 2, 2)), flux2_inputs
    ),
    "Flux3Transformer2DModel": Tiny(
        partial(
            flux_like, "Flux3Transformer2DModel", axes_dims_rope=(2, 2, 2, 2), cond_in_channels=12
        ),
        flux3_inputs,
    ),
    "FluxTransformer2DModel": Tiny(flux, flux_inputs),
    "GlmImageTransformer2DModel": Tiny(
        partial(cogview, "GlmImageTransformer2DModel", prior_vq_quantizer_codebook_size=10),
        glm_image_inputs,
    ),
    # each expert sees the tokens of all samples that are routed to it
    "HiDreamImageTransformer2DModel": Tiny(hidream, hidream_inputs, exclude=r".*\.experts\..*"),
    "HunyuanDiT2DModel": Tiny(hunyuan_dit, hunyuan_dit_inputs),
    "HunyuanImageTransformer2DModel": Tiny(hunyuan_image, hunyuan_image_inputs),
    "Ideogram4Transformer2DModel": Tiny(ideogram4, ideogram4_inputs),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        partial(joy_image, "JoyImageEditPlusTransformer3DModel"), joy_image_plus_inputs
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        partial(joy_image, "JoyImageEditTransformer3DModel"), joy_image_inputs
    ),
    # the projector has one output, too few for the ranks
    "Krea2Transformer2DModel": Tiny(krea2, krea2_inputs, exclude=r"text_fusion\.projector"),
    "LongCatImageTransformer2DModel": Tiny(
        partial(flux_like, "LongCatImageTransformer2DModel"), flux_like_inputs
    ),
    "Lumina2Transformer2DModel": Tiny(lumina2, lumina2_inputs),
    "LuminaNextDiT2DModel": Tiny(lumina_next, lumina_next_inputs),
    "NucleusMoEImageTransformer2DModel": Tiny(nucleus_moe, qwen_image_inputs),
    "OmniGenTransformer2DModel": Tiny(omnigen, omnigen_inputs),
    "OvisImageTransformer2DModel": Tiny(
        partial(flux_like, "OvisImageTransformer2DModel"), flux_like_inputs
    ),
    "PRXTransformer2DModel": Tiny(prx, image_text_inputs),
    "PixArtTransformer2DModel": Tiny(pixart, pixart_inputs),
    # the modulation has a row for each sample and one more, for t=0
    "QwenImage21Transformer2DModel": Tiny(
        partial(qwen_like, "QwenImage21Transformer2DModel", context_in_dim=16),
        qwen_image21_inputs,
        exclude=r"(time_text_embed|modulation|norm_out)\..*",
    ),
    "QwenImageTransformer2DModel": Tiny(qwen_image, qwen_image_inputs),
    "SD3Transformer2DModel": Tiny(sd3, sd3_inputs),
    "SanaTransformer2DModel": Tiny(sana, image_text_inputs),
    # the embedders see the tokens of all samples in one sequence
    "ZImageTransformer2DModel": Tiny(
        z_image, z_image_inputs, exclude=r"(all_x_embedder|cap_embedder)\..*"
    ),
}
