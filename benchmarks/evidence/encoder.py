"""A small encoder of toybox pictures, trained on the base's scenes and never on a concept.

    PYTHONPATH=examples:benchmarks python -m evidence.encoder

It learns to tell the attributes of rendered scenes, half of them an object alone on grey. Its
features stand where others use CLIP, DINO or Inception; figures made with it say "toy" for that.
"""

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from toybox.scenes import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZE,
    TEXTURES,
    Scene,
    draw_object,
    render,
    sample_scene,
)
from tqdm import tqdm

WEIGHTS = Path(__file__).parent / "encoder.safetensors"
FEATURES = 24
GREY = 128
STREAM = 77  # the seed of its scenes; the base's pool is seed 0
HEADS = {
    "shape": SHAPES,
    "colour": COLOURS,
    "inner_shape": (None, *SHAPES),
    "inner_colour": (None, *COLOURS),
    "background": (None, *COLOURS),
    "texture": (None, *TEXTURES),
    "position": tuple(POSITIONS),
}


class Encoder(nn.Module):
    """Pictures ``(batch, 3, SIZE, SIZE)`` in [-1, 1] to ``FEATURES`` numbers each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.SiLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(4, 64), nn.SiLU(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64 * 16, FEATURES),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, sum(len(choices) for choices in HEADS.values()))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.trunk(pictures)

    def logits(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scores of each attribute's choices."""
        sizes = [len(choices) for choices in HEADS.values()]
        return dict(zip(HEADS, self.head(F.silu(features)).split(sizes, -1), strict=True))


def example(index: int) -> tuple[Image.Image, list[int]]:
    """A training picture and the number of its choice in each head."""
    scene = sample_scene(STREAM, index)
    truth = [scene.shape, scene.colour, *(scene.inner or (None, None))]
    if index % 2:
        setting = [scene.background, scene.texture, scene.position]
        picture = render(scene)
    else:
        setting = [None, None, "center"]
        picture = on_grey(replace(scene, position="center"))
    values = [*truth, *setting]
    return picture, [c.index(v) for c, v in zip(HEADS.values(), values, strict=True)]


def on_grey(scene: Scene) -> Image.Image:
    """The scene's object on grey."""
    return draw_object(np.full((SIZE, SIZE, 3), GREY, np.float32), scene)


def as_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures as ``(batch, 3, SIZE, SIZE)`` in [-1, 1]."""
    pixels = np.stack([np.asarray(p.convert("RGB"), np.float32) for p in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def train(steps: int = 800, batch: int = 64) -> tuple[Encoder, dict[str, float]]:
    """Train from scratch; returns the encoder and each head's accuracy on unseen pictures."""
    torch.manual_seed(STREAM)
    encoder = Encoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in tqdm(range(steps), desc="encoder", unit="step"):
        pictures, labels = zip(*map(example, range(step * batch, (step + 1) * batch)), strict=True)
        scores = encoder.logits(encoder(as_tensor(list(pictures))))
        targets = torch.tensor(labels).T
        losses = [F.cross_entropy(s, t) for s, t in zip(scores.values(), targets, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return encoder.eval(), accuracy(encoder, range(steps * batch, steps * batch + 500))


@torch.no_grad()
def accuracy(encoder: Encoder, indices: range) -> dict[str, float]:
    """The share of pictures whose attribute each head tells."""
    pictures, labels = zip(*map(example, indices), strict=True)
    scores = encoder.logits(encoder(as_tensor(list(pictures))))
    targets = torch.tensor(labels).T
    return {
        name: float((s.argmax(-1) == t).float().mean())
        for (name, s), t in zip(scores.items(), targets, strict=True)
    }


@lru_cache
def load() -> Encoder:
    """The committed encoder."""
    encoder = Encoder().eval()
    encoder.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return encoder


@torch.no_grad()
def embed(pictures: list[Image.Image]) -> np.ndarray:
    """Features of pictures, ``(batch, FEATURES)``."""
    return load()(as_tensor(pictures)).numpy()


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of paired feature vectors, ``(batch,)``."""
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return (first * second).sum(-1) / np.maximum(norms, 1e-12)


def main() -> None:
    encoder, rates = train()
    save_file({k: v.half().contiguous() for k, v in encoder.state_dict().items()}, WEIGHTS)
    print(", ".join(f"{name} {rate:.3f}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
