"""Pipelines without tokenizers: they take embeddings."""

import diffusers
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel

from ..conftest import tiny_unet
from . import image

TIMES = [torch.tensor(t) for t in (0, 300, 700, 999)]


def autoencoder():
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8
    )


def text_encoder(**sizes):
    config = {"hidden_size": 16, "num_hidden_layers": 2, **sizes}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20,
            intermediate_size=16,
            num_attention_heads=2,
            max_position_embeddings=8,
            **config,
        )
    )


def stable_diffusion(cls=diffusers.StableDiffusionPipeline, **parts):
    torch.manual_seed(0)
    defaults = {
        "vae": autoencoder(),
        "text_encoder": text_encoder(),
        "tokenizer": None,
        "unet": tiny_unet(),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return prepared(cls(**{**defaults, **parts}))


def flux():
    torch.manual_seed(0)
    return prepared(
        diffusers.FluxPipeline(
            vae=autoencoder(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=image.flux(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        )
    )


def prepared(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def generate(pipeline, steps=4, **kwargs):
    """Latents of one picture, the same for the same weights and masks."""
    generator = torch.Generator().manual_seed(3)
    draw = torch.Generator().manual_seed(4)
    embeddings = {"prompt_embeds": torch.randn(1, 3, 16, generator=draw)}
    if hasattr(pipeline, "transformer"):
        embeddings["pooled_prompt_embeds"] = torch.randn(1, 16, generator=draw)
    else:
        embeddings["negative_prompt_embeds"] = torch.zeros(1, 3, 16)
    dtype = denoiser(pipeline).dtype
    embeddings = {name: value.to(dtype) for name, value in embeddings.items()}
    return pipeline(
        **embeddings,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        **{"height": 8, "width": 8, **kwargs},
    ).images.float()


def denoiser(pipeline):
    return getattr(pipeline, "unet", None) or pipeline.transformer


def save_weights(pipeline, folder):
    """Save the adapter of a pipeline's denoiser as the scripts of diffusers do."""
    weights = get_peft_model_state_dict(denoiser(pipeline))
    kind = "transformer" if hasattr(pipeline, "transformer") else "unet"
    if kind == "unet":
        weights = convert_state_dict_to_diffusers(weights)
    pipeline.save_lora_weights(folder, **{f"{kind}_lora_layers": weights})


class LoaderPipeline(StableDiffusionLoraLoaderMixin):
    """Just what the loader asks of a pipeline."""

    def __init__(self):
        torch.manual_seed(0)
        self.unet = tiny_unet()
        self.text_encoder = text_encoder().eval()
        self.components = {"unet": self.unet, "text_encoder": self.text_encoder}
        self.hf_device_map = None

    @torch.no_grad()
    def outputs(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 4, 8, 8, generator=generator)
        states = self.text_encoder(torch.arange(10).view(2, 5)).last_hidden_state
        return [self.unet(x, t, states).sample for t in TIMES]


def save_parts(pipeline, folder, metadata):
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    layers = {
        f"{name}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(part))
        for name, part in parts.items()
    }
    extra = _collate_lora_metadata(parts) if metadata else {}
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, **layers, **extra)
