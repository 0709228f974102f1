"""Transformers that make video, audio or proteins."""

import inspect
import warnings
from functools import partial

import diffusers
import torch

from . import Tiny

FRAMES, TEXT, AUDIO = 3, 5, 7  # unlike the batch of 2, and each other
TOKENS = 4 * FRAMES
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
LATENTS = {"in_channels": 4, "out_channels": 4}


def build(name, **config):
    return getattr(diffusers, name)(**config)


def accepted(function, **arguments):
    """Those of some arguments that a class or function of this release of diffusers takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def beside(cls, name):
    """What the module of a class has beside it; a release without the class has no such module."""
    return getattr(inspect.getmodule(cls), name)


def video_inputs(batch, channels=4, frames=FRAMES, **kwargs):
    return {
        "hidden_states": torch.randn(batch, channels, frames, 4, 4),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        **kwargs,
    }


def frames_first_inputs(batch, **kwargs):
    return video_inputs(batch, **kwargs, hidden_states=torch.randn(batch, FRAMES, 4, 4, 4))


def masked_inputs(batch, **kwargs):
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    return video_inputs(batch, encoder_attention_mask=mask, **kwargs)


def token_inputs(batch, **kwargs):
    return masked_inputs(batch, **kwargs, hidden_states=torch.randn(batch, TOKENS, 4))


def audio_inputs(batch, length=AUDIO, channels_last=False, **kwargs):
    shape = (length, 4) if channels_last else (4, length)
    return {
        "hidden_states": torch.randn(batch, *shape),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        **kwargs,
    }


def repeated(t, count=FRAMES):
    return t[:, None].expand(-1, count)


def anyflow_times(t):
    return {"timestep": repeated(t), "r_timestep": repeated(t)}


def cogvideox(name="CogVideoXTransformer3DModel", **kwargs):
    config = {
        **HEADS | LATENTS,
        "time_embed_dim": 12,
        "text_embed_dim": 16,
        "num_layers": 1,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 4 * (FRAMES - 1) + 1,
        "max_text_seq_length": TEXT,
    }
    return build(name, **{**config, **kwargs})


def consisid():
    return cogvideox(
        "ConsisIDTransformer3DModel",
        num_attention_heads=3,
        attention_head_dim=16,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=12,
        LFE_vit_dim=16,
        LFE_depth=1,
        LFE_num_scale=1,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=3,
        LFE_num_querie=6,
        LFE_output_dim=32,
        LFE_ff_mult=2,
    )


def consisid_inputs(batch):
    return frames_first_inputs(
        batch, id_cond=torch.randn(batch, 12), id_vit_hidden=[torch.randn(batch, 7, 16)]
    )


def latte():
    return build(
        "LatteTransformer3DModel",
        **HEADS,
        in_channels=4,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=4,
        patch_size=2,
        norm_type="ada_norm_single",
        caption_channels=16,
        video_length=FRAMES,
    )


def allegro():
    return build(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        sample_height=4,
        sample_width=4,
        sample_frames=FRAMES,
        caption_channels=16,
    )


def wan(name="WanTransformer3DModel", **kwargs):
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        **LATENTS,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": 2,
    }
    return build(name, **{**config, **kwargs})


def anyflow_far():
    model = wan("AnyFlowFARTransformer3DModel", full_chunk_limit=1, chunk_partition=(1, FRAMES - 1))
    for block in model.blocks:  # flex attention has no backward on the CPU
        block.attn1.set_processor(beside(type(model), "AnyFlowAttnProcessor")())
    return model


def anyflow_far_inputs(batch):
    tokens = TOKENS - 3  # the first frame is compressed into one
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return frames_first_inputs(batch, chunk_partition=(1, FRAMES - 1), attention_mask=causal)


def cosmos3():
    return build(
        "Cosmos3OmniTransformer",
        head_dim=8,
        hidden_size=16,
        intermediate_size=24,
        latent_channel=4,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=16,
        rope_scaling={"mrope_section": [2, 1, 1]},
        vocab_size=32,
    )


def cosmos3_inputs(batch):
    length = TEXT + TOKENS * batch
    vision = torch.arange(TEXT, length)
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(length).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": length,
        "vision_tokens": [torch.randn(1, 4, FRAMES, 4, 4) for _ in range(batch)],
        "vision_token_shapes": [(FRAMES, 2, 2)] * batch,
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_noisy_frame_indexes": [torch.arange(FRAMES)] * batch,
    }


def cosmos():
    return build(
        "CosmosTransformer3DModel",
        **LATENTS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        text_embed_dim=16,
        adaln_lora_dim=6,
        max_size=(FRAMES, 4, 4),
        concat_padding_mask=False,
    )


def easyanimate():
    return build(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        **LATENTS,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=12,
        text_embed_dim=16,
    )


def helios_inputs(batch):
    history = {}
    for name, frames in (("short", 1), ("mid", 2), ("long", 4)):
        history[f"latents_history_{name}"] = torch.randn(batch, 4, frames, 4, 4)
        history[f"indices_latents_history_{name}"] = torch.arange(frames).expand(batch, -1)
    indices = torch.arange(7, 7 + FRAMES).expand(batch, -1)
    return video_inputs(batch, indices_hidden_states=indices, **history)


def hunyuan(name, **kwargs):
    config = {
        **HEADS | LATENTS,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 2,
        "text_embed_dim": 16,
        "rope_axes_dim": (2, 2, 4),
    }
    return build(name, **{**config, **kwargs})


def hunyuan_video(name="HunyuanVideoTransformer3DModel", **kwargs):
    return hunyuan(name, num_single_layers=1, pooled_projection_dim=12, **kwargs)


def hunyuan_video_inputs(batch, **kwargs):
    pooled = torch.randn(batch, 12)
    guidance = torch.full((batch,), 6000.0)
    return masked_inputs(batch, pooled_projections=pooled, guidance=guidance, **kwargs)


def hunyuan15_inputs(batch):
    return masked_inputs(
        batch,
        encoder_hidden_states_2=torch.randn(batch, 6, 16),
        encoder_attention_mask_2=torch.ones(batch, 6, dtype=torch.bool),
        image_embeds=torch.randn(batch, 7, 16),
    )


def framepack_inputs(batch):
    history = {}
    for name, frames in (("clean", 1), ("history_2x", 2), ("history_4x", 4)):
        history[f"latents_{name}"] = torch.randn(batch, 4, frames, 4, 4)
        history[f"indices_latents_{name}"] = torch.arange(frames)
    indices = torch.arange(7, 7 + FRAMES)
    images = torch.randn(batch, 6, 16)
    return hunyuan_video_inputs(batch, indices_latents=indices, image_embeds=images, **history)


def kandinsky(name, **kwargs):
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "time_dim": 12,
        "model_dim": 16,
        "ff_dim": 24,
        "num_visual_blocks": 1,
        "axes_dims": (2, 2, 4),
    }
    return build(name, **config, **kwargs)


def kandinsky_with_text(name, **kwargs):
    return kandinsky(name, in_text_dim=16, in_text_dim2=12, num_text_blocks=1, **kwargs)


def kandinsky_inputs(batch, **kwargs):
    return frames_first_inputs(batch, pooled_projections=torch.randn(batch, 12), **kwargs)


def kandinsky5_inputs(batch):
    positions = [torch.arange(size) for size in (FRAMES, 2, 2)]
    return kandinsky_inputs(batch, visual_rope_pos=positions, text_rope_pos=torch.arange(TEXT))


def kandinsky6_sr():
    model = kandinsky("Kandinsky6SRTransformer3DModel")
    attend = beside(diffusers.Kandinsky6Transformer3DModel, "Kandinsky6AttnProcessor")()
    for block in model.visual_transformer_blocks:  # flex attention has no backward on the CPU
        block.self_attention.set_processor(
            lambda attention, x, rope, _: attend(attention, x, None, rope, rope)
        )
    return model


def kandinsky6_sr_inputs(batch):
    return {"hidden_states": torch.randn(batch, FRAMES, 8, 8, 9)}


def ltx(name="LTXVideoTransformer3DModel", **kwargs):
    return build(
        name,
        **HEADS | LATENTS,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
        **kwargs,
    )


def ltx2(name="LTX2VideoTransformer3DModel", **kwargs):
    return ltx(
        name,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=6,
        audio_cross_attention_dim=12,
        **kwargs,
    )


def ltx2_video():
    cls = diffusers.LTX2VideoTransformer3DModel
    return ltx2(**accepted(cls, cross_attn_mod=True, audio_cross_attn_mod=True))


def ltx2_timestep(t):
    return accepted(diffusers.LTX2VideoTransformer3DModel.forward, timestep=t, sigma=t)


def ltx_inputs(batch, **kwargs):
    return token_inputs(batch, num_frames=FRAMES, height=2, width=2, **kwargs)


def ltx2_inputs(batch):
    return ltx_inputs(
        batch,
        audio_hidden_states=torch.randn(batch, AUDIO, 4),
        audio_encoder_hidden_states=torch.randn(batch, TEXT, 16),
        audio_num_frames=AUDIO,
    )


def refiner_inputs(batch):
    angles = torch.randn(batch, TOKENS, 16)
    return token_inputs(batch, video_rotary_emb=(angles.cos(), angles.sin()))


def mochi():
    # its positions ask for an autocast to float32; pytest forgets the filter after the test
    warnings.filterwarnings("ignore", "In CPU autocast")
    return build(
        "MochiTransformer3DModel",
        **HEADS,
        num_layers=2,
        pooled_projection_dim=12,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=6,
    )


def motif():
    return build(
        "MotifVideoTransformer3DModel",
        **HEADS | LATENTS,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(2, 2, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


def motif_inputs(batch):
    return masked_inputs(batch, image_embeds=torch.randn(batch, 7, 16))


def sana_video():
    return build(
        "SanaVideoTransformer3DModel",
        **LATENTS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        mlp_ratio=2.0,
        sample_size=4,
    )


def sana_wm():
    return build(
        "SanaWMTransformer3DModel",
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        patch_size=(1, 2, 2),
        softmax_every_n=2,
        linear_head_dim=8,
        chunk_plucker_channels=6,
        caption_channels=16,
        mlp_ratio=2.0,
    )


def sana_wm_inputs(batch):
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4.0, 2.0, 2.0])])
    return masked_inputs(
        batch,
        encoder_hidden_states=torch.randn(batch, 1, TEXT, 16),
        camera_conditions=camera.expand(batch, FRAMES, -1),
        chunk_plucker=torch.randn(batch, 6, FRAMES, 4, 4),
    )


def wan_animate():
    return wan(
        "WanAnimateTransformer3DModel",
        in_channels=12,
        latent_channels=4,
        image_dim=None,
        motion_encoder_channel_sizes={"4": 6, "8": 6},
        motion_encoder_size=8,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=6,
        face_encoder_num_heads=3,
        inject_face_latents_blocks=1,
    )


def wan_animate_inputs(batch):
    return video_inputs(
        batch,
        channels=12,
        pose_hidden_states=torch.randn(batch, 4, FRAMES - 1, 4, 4),
        face_pixel_values=torch.randn(batch, 3, 4 * (FRAMES - 2) + 1, 8, 8),
    )


def wan_animate2():
    return build(
        "WanAnimate2Transformer3DModel",
        text_len=TEXT,
        in_dim=8,
        dim=24,
        ffn_dim=16,
        freq_dim=16,
        text_dim=16,
        out_dim=4,
        num_heads=2,
        num_layers=2,
        use_img_emb=False,
    )


def wan_animate2_inputs(batch):
    # the pass over the reference: the other takes flex attention, without backward on the CPU
    return {
        "hidden_states": list(torch.randn(batch, 4, FRAMES, 4, 4)),
        "encoder_hidden_states": list(torch.randn(batch, TEXT, 16)),
        "condition_latents": list(torch.randn(batch, 4, FRAMES, 4, 4)),
        "kv_cache": beside(diffusers.WanAnimate2Transformer3DModel, "WanAnimate2KVCache")(2),
        "kv_cache_mode": "extract",
        "seq_len": TOKENS,
        "offset_grid_sizes": torch.tensor([[FRAMES, 2, 2]]),
    }


def minimax_h3():
    return build(
        "MiniMaxH3Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        ffn_dim=24,
        in_channels=4,
        audio_in_channels=4,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=12,
        time_embed_dim=8,
        rope_freq_dim=2,
    )


def minimax_h3_inputs(batch):
    counts = torch.tensor([TEXT, TOKENS, AUDIO])
    rows = torch.arange(counts.sum())
    text, video, audio = rows.split(counts.tolist())
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "audio_hidden_states": torch.randn(batch, AUDIO, 4),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep_indices": rows % 2,
        "token_tags": torch.arange(3).repeat_interleave(counts),
        "position_ids": rows[:, None].expand(-1, 3),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def ace_step():
    return build(
        "AceStepTransformer1DModel",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=2,
    )


def ace_step_inputs(batch):
    return audio_inputs(batch, channels_last=True, context_latents=torch.randn(batch, AUDIO, 8))


def stable_audio():
    return build(
        "StableAudioDiTModel",
        sample_size=AUDIO,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=12,
        cross_attention_input_dim=16,
    )


def stable_audio_inputs(batch):
    # it warns of its own output class
    global_states = torch.randn(batch, 1, 12)
    return audio_inputs(batch, global_hidden_states=global_states, return_dict=False)


def stable_audio3():
    return build(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
        cond_token_dim=16,
        global_cond_dim=12,
        local_add_cond_dim=6,
        timestep_features_dim=8,
        ff_mult=2.0,
        num_memory_tokens=3,
    )


def stable_audio3_inputs(batch):
    return audio_inputs(
        batch,
        global_hidden_states=torch.randn(batch, 12),
        local_add_cond=torch.randn(batch, 6, AUDIO),
    )


def longcat_audio():
    return build(
        "LongCatAudioDiTTransformer",
        dit_dim=16,
        dit_depth=1,
        dit_heads=2,
        dit_text_dim=16,
        latent_dim=4,
        ff_mult=2.0,
    )


def longcat_audio_inputs(batch):
    return audio_inputs(
        batch,
        channels_last=True,
        encoder_attention_mask=torch.ones(batch, TEXT, dtype=torch.bool),
        latent_cond=torch.randn(batch, AUDIO, 4),
    )


def minimax_music3():
    return build(
        "MiniMaxMusic3Transformer1DModel",
        in_channels=4,
        condition_dim=16,
        num_layers=1,
        **HEADS,
        ff_inner_dim=24,
        rotary_dim=4,
        fourier_embedding_dim=16,
    )


def proteina():
    return build(
        "RFD4ProteinaTransformer",
        nlayers=2,
        token_dim=16,
        nheads=4,
        dim_cond=12,
        pair_repr_dim=8,
        latent_dim=4,
        t_emb_dim=16,
        xt_pair_dist_dim=6,
        feats_seq=("xt_bb_ca", "xt_local_latents"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists",),
        tri_mult_c=6,
        num_sequence_classes=10,
    )


def proteina_inputs(batch):
    mask = torch.ones(batch, 7, dtype=torch.bool)
    return {
        "bb_ca": torch.randn(batch, 7, 3),
        "local_latents": torch.randn(batch, 7, 4),
        "padding_mask": mask,
        "recycle_depth": 2,
        "conditioning": {"is_in_context_conditioning": ~mask, "supports_local_latent": mask},
    }


MODELS = {
    "AceStepTransformer1DModel": Tiny(
        ace_step, ace_step_inputs, timestep=lambda t: {"timestep": t, "timestep_r": t}
    ),
    "AllegroTransformer3DModel": Tiny(allegro, video_inputs),
    "AnyFlowFARTransformer3DModel": Tiny(anyflow_far, anyflow_far_inputs, timestep=anyflow_times),
    "AnyFlowTransformer3DModel": Tiny(
        partial(wan, "AnyFlowTransformer3DModel"), frames_first_inputs, timestep=anyflow_times
    ),
    "ChronoEditTransformer3DModel": Tiny(
        partial(wan, "ChronoEditTransformer3DModel"), video_inputs
    ),
    "CogVideoXTransformer3DModel": Tiny(cogvideox, frames_first_inputs),
    "ConsisIDTransformer3DModel": Tiny(consisid, consisid_inputs),
    # all samples are packed into one sequence, without a batch
    "Cosmos3OmniTransformer": Tiny(
        cosmos3,
        cosmos3_inputs,
        timestep=lambda t: {"vision_timesteps": t.repeat_interleave(TOKENS)},
        own_masks=False,
    ),
    "CosmosTransformer3DModel": Tiny(
        cosmos,
        video_inputs,
        timestep=lambda t: {"timestep": repeated(t)[:, None, :, None, None]},
    ),
    "EasyAnimateTransformer3DModel": Tiny(easyanimate, video_inputs),
    # these see the timestep 0 of the history too, as one row for all samples
    "HeliosTransformer3DModel": Tiny(
        partial(wan, "HeliosTransformer3DModel", rope_dim=(4, 4, 4)),
        helios_inputs,
        exclude=r"condition_embedder\.time_(embedder\..*|proj)",
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        partial(
            hunyuan,
            "HunyuanVideo15Transformer3DModel",
            num_layers=2,
            text_embed_2_dim=16,
            image_embed_dim=16,
        ),
        hunyuan15_inputs,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        partial(
            hunyuan_video,
            "HunyuanVideoFramepackTransformer3DModel",
            has_image_proj=True,
            image_proj_dim=16,
            has_clean_x_embedder=True,
        ),
        framepack_inputs,
    ),
    "HunyuanVideoTransformer3DModel": Tiny(hunyuan_video, hunyuan_video_inputs),
    "Kandinsky5Transformer3DModel": Tiny(
        partial(kandinsky_with_text, "Kandinsky5Transformer3DModel"), kandinsky5_inputs
    ),
    "Kandinsky6SRTransformer3DModel": Tiny(kandinsky6_sr, kandinsky6_sr_inputs),
    "Kandinsky6Transformer3DModel": Tiny(
        partial(
            kandinsky_with_text,
            "Kandinsky6Transformer3DModel",
            visual_cond=False,
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        lambda batch: kandinsky_inputs(batch, audio_hidden_states=torch.randn(batch, AUDIO, 4)),
    ),
    "LTX2VideoTransformer3DModel": Tiny(ltx2_video, ltx2_inputs, ltx2_timestep),
    "LTXVideoTransformer3DModel": Tiny(ltx, ltx_inputs),
    "LatteTransformer3DModel": Tiny(latte, video_inputs),
    "LongCatAudioDiTTransformer": Tiny(longcat_audio, longcat_audio_inputs),
    # the timesteps belong to the rows of the sequence, the same for all samples
    "MiniMaxH3Transformer3DModel": Tiny(minimax_h3, minimax_h3_inputs, own_masks=False),
    "MiniMaxMusic3Transformer1DModel": Tiny(minimax_music3, partial(audio_inputs, length=TEXT)),
    "MochiTransformer3DModel": Tiny(mochi, masked_inputs),
    "MotifVideoTransformer3DModel": Tiny(motif, motif_inputs),
    # three coordinates are fewer than the ranks
    "RFD4ProteinaTransformer": Tiny(
        proteina,
        proteina_inputs,
        timestep=lambda t: {"bb_ca_time": t, "local_latents_time": t},
        exclude=r"ca_linear\.1",
    ),
    "SanaVideoTransformer3DModel": Tiny(sana_video, masked_inputs),
    "SanaWMLTX2RefinerTransformer3DModel": Tiny(
        partial(ltx2, "SanaWMLTX2RefinerTransformer3DModel"),
        refiner_inputs,
        timestep=lambda t: {"timestep": repeated(t, TOKENS)},
    ),
    "SanaWMTransformer3DModel": Tiny(
        sana_wm, sana_wm_inputs, timestep=lambda t: {"timestep": repeated(t)[:, None]}
    ),
    "SkyReelsV2Transformer3DModel": Tiny(
        partial(wan, "SkyReelsV2Transformer3DModel"),
        partial(video_inputs, enable_diffusion_forcing=True),
        timestep=lambda t: {"timestep": repeated(t)},
    ),
    "StableAudio3DiTModel": Tiny(stable_audio3, stable_audio3_inputs),
    "StableAudioDiTModel": Tiny(stable_audio, stable_audio_inputs),
    "WanAnimate2Transformer3DModel": Tiny(wan_animate2, wan_animate2_inputs),
    "WanAnimateTransformer3DModel": Tiny(wan_animate, wan_animate_inputs),
    "WanTransformer3DModel": Tiny(wan, partial(video_inputs, frames=2)),  # 8 tokens
    "WanVACETransformer3DModel": Tiny(
        partial(wan, "WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=4),
        lambda batch: video_inputs(
            batch, control_hidden_states=torch.randn(batch, 4, FRAMES, 4, 4)
        ),
    ),
}
