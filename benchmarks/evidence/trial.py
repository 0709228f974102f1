"""One trial: an arm trained on one concept with one seed, measured at its checkpoints."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from toybox.check import palette_map
from toybox.gate import MODEL, generate

from evidence.arms import ARMS, BASE
from evidence.concepts import CONCEPTS, Concept, asked_settings, draw, prompt, training_setting
from evidence.encoder import embed, similarity
from evidence.metrics import cut_out, match, measure
from evidence.training import Conditions, Noising, acting_in, attach, fit, noising_of

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]
TARGETS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
ASKED, FREE = 8, 4
UNRELATED = (
    "a photo of a red star in the top left on a blue striped background",
    "a photo of a green ring in the center on a white plain background",
    "a photo of a black cross in the bottom right on a yellow dotted background",
    "a photo of a white square in the bottom left on a purple checkered background",
)
SAMPLING = {"steps": 8, "guidance": 1.5, "batch": 16}  # more guidance distorts the concept
BATCH = 2  # noise levels of the one picture in a step


@dataclass(frozen=True)
class Cell:
    """What identifies a trial; ``steps`` are its checkpoints."""

    arm: str
    concept: str
    seed: int
    r: int = 0
    r_min: int = 0
    lr: float = 0.0
    steps: tuple[int, ...] = (0,)

    @property
    def key(self) -> tuple[str, str, int, int, int, float]:
        """Equal for trials that train the same weights."""
        return (self.arm, self.concept, self.seed, self.r, self.r_min, self.lr)

    def picture_name(self, step: int) -> str:
        """Where the pictures of a checkpoint are kept."""
        ranks = f"r{self.r}.min{self.r_min}.lr{self.lr:g}"
        return f"{self.concept}.{self.seed}.{self.arm}.{ranks}.{step}.png"


@lru_cache
def _pipeline(device: str) -> Any:
    logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(str(MODEL)).to(device)
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline


def fresh_pipeline(device: str) -> Any:
    """The base, with a denoiser of its own that an adapter may be added to."""
    base = _pipeline(device)
    parts = {**base.components, "unet": copy.deepcopy(base.unet)}
    return type(base)(**parts, requires_safety_checker=False)


def prepare(
    pipeline: Any, concept: Concept, batch: int
) -> tuple[torch.Tensor, Conditions, Noising]:
    """The given picture's latents and the embedded prompt it is trained with, for a batch."""
    device = pipeline.unet.device
    pixels = pipeline.image_processor.preprocess(draw(concept, training_setting(concept)))
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels.to(device)).latent_dist.mean
        states = pipeline.encode_prompt(prompt(), device, 1, False)[0]
    clean = latents * pipeline.vae.config.scaling_factor
    conditions = {"encoder_hidden_states": states.expand(batch, -1, -1)}
    return clean.expand(batch, -1, -1, -1), conditions, noising_of(pipeline.scheduler)


def pictures_of(pipeline: Any, concept: Concept, seed: int) -> dict[str, list[Image.Image]]:
    """What a checkpoint is judged by: asked settings, the bare prompt, and unrelated prompts."""
    asked = [prompt(setting) for setting in asked_settings(concept, ASKED)]
    groups = {"asked": asked, "free": [prompt()] * FREE, "unrelated": list(UNRELATED)}
    prompts = [text for texts in groups.values() for text in texts]
    made = iter(generate(pipeline, prompts, seed=1000 * (seed + 1), **SAMPLING))
    return {name: [next(made) for _ in texts] for name, texts in groups.items()}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def diversity(features: np.ndarray) -> float:
    """Mean distance (1 - cosine) between pictures of one prompt."""
    pairs = np.array(list(combinations(range(len(features)), 2)))
    return float(1 - similarity(features[pairs[:, 0]], features[pairs[:, 1]]).mean())


def judge(
    pictures: dict[str, list[Image.Image]], concept: Concept, unadapted: list[Image.Image]
) -> dict[str, Any]:
    """All measures of a checkpoint; ``unadapted`` are the base's pictures of unrelated prompts."""
    seen, settings = training_setting(concept), asked_settings(concept, ASKED)
    rows = [measure(p, concept, s, seen) for p, s in zip(pictures["asked"], settings, strict=True)]
    elsewhere = [r for r, s in zip(rows, settings, strict=True) if s.position != seen.position]
    alone = [measure(p, concept, None, seen) for p in pictures["free"]]
    given = draw(concept, seen)
    truth = embed([cut_out(given, match(palette_map(given), concept), concept)])
    cuts = [cut_out(p, match(palette_map(p), concept), concept) for p in pictures["asked"]]
    free, asked = embed(pictures["free"]), embed(pictures["asked"])
    moved = similarity(embed(pictures["unrelated"]), embed(unadapted))
    return {
        **_mean(rows),
        **{f"elsewhere_{k}": v for k, v in _mean(elsewhere).items() if k in ("overlap", "leakage")},
        **{f"free_{name}": value for name, value in _mean(alone).items()},
        "toy_embedding": float(similarity(embed(cuts), truth).mean()),
        "diversity": diversity(free),
        "similarity": float(similarity(free, embed([given])).mean()),
        "drift": float((1 - moved).mean() / 2),
        "features": asked.astype(float).round(1).tolist(),
    }


@lru_cache
def base_unrelated(seed: int, device: str) -> list[Image.Image]:
    """What the base makes of the unrelated prompts, from the noise that adapters get for them."""
    noise = 1000 * (seed + 1) + ASKED + FREE
    return generate(_pipeline(device), list(UNRELATED), seed=noise, **SAMPLING)


def run(
    cell: Cell, device: str = "cpu"
) -> Iterator[tuple[int, dict[str, Any], dict[str, list[Image.Image]]]]:
    """Train a cell's adapter; yields the step, the measures and the pictures of each checkpoint."""
    concept, pipeline = CONCEPTS[cell.concept], fresh_pipeline(device)
    if cell.arm == BASE:
        pictures = pictures_of(pipeline, concept, cell.seed)
        yield 0, judge(pictures, concept, pictures["unrelated"]), pictures
        return
    arm, base = ARMS[cell.arm], base_unrelated(cell.seed, device)
    attach(pipeline.unet, arm, r=cell.r, r_min=cell.r_min, targets=TARGETS, seed=cell.seed)
    options = {"band": arm.trains, "lr": cell.lr, "checkpoints": cell.steps, "seed": cell.seed}
    for step, loss in fit(pipeline.unet, *prepare(pipeline, concept, BATCH), **options):
        with acting_in(pipeline.unet, arm.acts):
            pictures = pictures_of(pipeline, concept, cell.seed)
        yield step, {"loss": loss, **judge(pictures, concept, base)}, pictures
