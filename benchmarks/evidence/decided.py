"""At which noise the base decides what of a picture.

True scenes are noised up to a timestep and denoised without a prompt: what is still there was
decided at more noise, what is lost is decided at less.
"""

from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from toybox.check import ATTRIBUTES
from toybox.gate import held_out_scenes, score
from toybox.scenes import render

from evidence.tables import markdown
from evidence.trial import SAMPLING, fresh_pipeline

SCENES = 64


def kept_after(pipeline: Any, count: int = SCENES, seed: int = 0) -> dict[int, dict[str, float]]:
    """The shares of scenes that keep each attribute, by the timestep they were noised up to."""
    scenes = held_out_scenes(count, seed)
    again: Any = StableDiffusionImg2ImgPipeline(
        **pipeline.components, requires_safety_checker=False
    )
    again.set_progress_bar_config(disable=True)
    shares = {}
    for left in range(1, SAMPLING["steps"] + 1):
        made = again(
            [""] * count,
            image=[render(scene) for scene in scenes],
            strength=left / SAMPLING["steps"],
            num_inference_steps=SAMPLING["steps"],
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
        )
        shares[int(again.scheduler.timesteps[-left])] = score(made.images, scenes)
    return shares


def decided_table(device: str) -> str:
    """The shares, least noise first."""
    shares = kept_after(fresh_pipeline(device))
    rows = [[str(t), *(f"{kept[name]:.2f}" for name in ATTRIBUTES)] for t, kept in shares.items()]
    return markdown(["noised up to", *ATTRIBUTES], rows)
