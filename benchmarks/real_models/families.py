"""What differs between the models: the pipeline, its sampling, and how it is trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline
from evidence.training import NUM_TRAIN_TIMESTEPS, Conditions, Noising, noising_of
from PIL import Image
from torch.nn import functional as F

FLUX_GUIDANCE = 3.5  # what diffusers samples FLUX.1-dev with, and its scripts train it with
Prepared = tuple[torch.Tensor, Conditions, Noising]


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        pipeline: Its pipeline's class.
        model: The checkpoint on the hub.
        denoiser: The name of the pipeline's component that gets the adapter.
        steps: The checkpoints; every arm has all of them.
        sampling: Arguments of the pipeline's call.
        prepare: From (pipeline, picture, prompt) the denoiser's clean input of batch 1, its other
            arguments, and how noise is added to it.
    """

    pipeline: type[DiffusionPipeline]
    model: str
    denoiser: str
    steps: tuple[int, ...]
    sampling: dict[str, Any]
    prepare: Callable[[Any, Image.Image, str], Prepared]


@torch.no_grad()
def encode(pipeline: Any, image: Image.Image) -> torch.Tensor:
    """The picture's latents, normalised as the denoiser wants them."""
    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(image).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.mean
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def noise_schedule(scheduler: Any) -> dict[str, Any]:
    """What a sampler's config says about the noise the model was trained with."""
    names = (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
        "prediction_type",
    )  # fmt: skip
    return {name: scheduler.config[name] for name in names}


def prepare_sdxl(pipeline: Any, image: Image.Image, prompt: str) -> Prepared:
    """The prompt of an uncropped picture at full size."""
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    width, height = image.size
    times = torch.tensor([[height, width, 0, 0, height, width]]).to(states)
    conditions = {
        "encoder_hidden_states": states,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times},
    }
    # the sampler's add_noise may have another parametrization (Euler's has): train with DDPM's
    scheduler = DDPMScheduler(**noise_schedule(pipeline.scheduler))
    return encode(pipeline, image).to(states), conditions, noising_of(scheduler)


def prepare_flux(pipeline: Any, image: Image.Image, prompt: str) -> Prepared:
    """The latents in patches of 2 x 2, and the places of patches and words."""
    with torch.no_grad():
        states, pooled, text_ids = pipeline.encode_prompt(prompt)
    latents = encode(pipeline, image).to(states)
    rows, columns = (torch.arange(side // 2) for side in latents.shape[-2:])
    places = torch.cartesian_prod(torch.arange(1), rows, columns).to(states)
    conditions = {
        "encoder_hidden_states": states,
        "pooled_projections": pooled,
        "txt_ids": text_ids,
        "img_ids": places,
        "guidance": None,
    }
    if pipeline.transformer.config.guidance_embeds:
        conditions["guidance"] = torch.full((1,), FLUX_GUIDANCE, device=states.device)
    return F.pixel_unshuffle(latents, 2).flatten(2).mT, conditions, flow_matching


def flow_matching(
    clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Straight lines from the picture to noise: noisy input, its share of noise, velocity."""
    share = (timesteps + 1) / NUM_TRAIN_TIMESTEPS
    mixed = torch.lerp(clean.float(), noise.float(), share.view(-1, *[1] * (clean.dim() - 1)))
    return mixed.to(clean.dtype), share, noise - clean


FAMILIES = {
    "sdxl": Family(
        StableDiffusionXLPipeline,
        "stabilityai/stable-diffusion-xl-base-1.0",
        "unet",
        steps=(500, 800),  # the paper's for LoRA and Vanilla, and for T-LoRA
        sampling={"num_inference_steps": 25, "guidance_scale": 5.0},
        prepare=prepare_sdxl,
    ),
    "flux": Family(
        FluxPipeline,
        "black-forest-labs/FLUX.1-dev",
        "transformer",
        steps=(400, 500),  # the paper's for LoRA, and for Vanilla
        sampling={"num_inference_steps": 28, "guidance_scale": FLUX_GUIDANCE},
        prepare=prepare_flux,
    ),
}
