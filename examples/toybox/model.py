"""The toybox's parts: small Stable Diffusion components, and their export as a pipeline folder."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load, save_file
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toybox.scenes import SIZE, caption, combinations

LATENT_CHANNELS = 16
MAX_TOKENS = 32
TEXT_WIDTH = 128


def build_vae() -> AutoencoderKL:
    """A narrow autoencoder: 64 px pictures to 8 x 8 latents."""
    channels = (16, 32, 64, 128)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        sample_size=SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """A denoiser of 8 x 8 latents with cross-attention at both of its levels.

    The pooled caption also scales and shifts every block with the timestep's embedding. Through
    cross-attention alone a denoiser of this size takes far longer to heed places and objects.
    """
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction on a schedule that ends at (almost) pure noise."""
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE in CLIP's format: one token for every caption word, bytes for the rest."""
    scratch = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, end_of_word_suffix="</w>", show_progress=False
    )
    words = ["a photo of a toy", "a picture of a toy"] * 2
    scratch.train_from_iterator(words + [caption(s) for s in combinations(False)], trainer)
    merges = [tuple(pair) for pair in json.loads(scratch.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids as the pipeline makes them, shape ``(captions, MAX_TOKENS)``."""
    padded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return padded.input_ids


def build_pipeline(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    """The parts as a Stable Diffusion pipeline without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Add the two files that transformers 4 reads; version 5 writes ``tokenizer.json`` alone."""
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocab = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def _prefix_weights(file: Path) -> None:
    """Name the text encoder's weights as transformers 4 has them; newer versions read both."""
    weights = load(file.read_bytes())
    names = {name: f"text_model.{name.removeprefix('text_model.')}" for name in weights}
    renamed = {names[name]: weight for name, weight in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})


def export(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the fp16 pipeline folder, replacing an older one only when complete.

    The pipeline's denoiser and autoencoder are converted in place.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.unet.half()
    pipeline.vae.half()
    # The text encoder stays float32: transformers would otherwise load it as float16 beside a
    # float32 denoiser, because its default dtype is the stored one and diffusers' is float32.
    pipeline.save_pretrained(partial, safe_serialization=True)
    _write_vocabulary(pipeline.tokenizer, partial / "tokenizer")
    _prefix_weights(partial / "text_encoder" / "model.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
