"""The held-out concepts: odd two-coloured shapes that the base never saw, and where they are put.

Everything is drawn by a program, so the truth about every pixel is known.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw
from toybox.scenes import (
    COLOURS,
    PALETTE,
    POSITIONS,
    SUPERSAMPLE,
    TEXTURES,
    backdrop,
)

RADIUS = 15.0
WINDOW = 36  # side of a concept's window, which holds the object and a margin
Point = tuple[float, float]

# In units of the radius; y points down. None of them is an outline of the base's training set.
OUTLINES: dict[str, list[Point]] = {
    "arrow": [(0, -1), (1, 0), (0.4, 0), (0.4, 1), (-0.4, 1), (-0.4, 0), (-1, 0)],
    "house": [(0, -1), (1, -0.2), (0.8, -0.2), (0.8, 1), (-0.8, 1), (-0.8, -0.2), (-1, -0.2)],
    "hourglass": [(-0.95, -1), (0.95, -1), (0.25, 0), (0.95, 1), (-0.95, 1), (-0.25, 0)],
    "bolt": [(0.3, -1), (-0.8, 0.2), (-0.1, 0.2), (-0.4, 1), (0.85, -0.3), (0.1, -0.3)],
    "tee": [
        (-1, -1), (1, -1), (1, -0.3), (0.4, -0.3),
        (0.4, 1), (-0.4, 1), (-0.4, -0.3), (-1, -0.3),
    ],
    "stairs": [
        (-1, -1), (-0.3, -1), (-0.3, -0.3), (0.4, -0.3),
        (0.4, 0.3), (1, 0.3), (1, 1), (-1, 1),
    ],
    "kite": [(0, -1), (0.8, -0.35), (0, 1), (-0.8, -0.35)],
    "crown": [(-1, -0.8), (-0.5, 0), (0, -0.9), (0.5, 0), (1, -0.8), (1, 0.8), (-1, 0.8)],
    "bow": [(-1, -0.8), (0, -0.3), (1, -0.8), (1, 0.8), (0, 0.3), (-1, 0.8)],
    "key": [
        (-0.5, -1), (0.5, -1), (0.5, -0.2), (0.2, -0.2), (0.2, 0.5),
        (0.8, 0.5), (0.8, 1), (-0.2, 1), (-0.2, -0.2), (-0.5, -0.2),
    ],
    "fish": [(-1, -0.6), (-0.5, -0.1), (0.2, -0.75), (1, 0), (0.2, 0.75), (-0.5, 0.1), (-1, 0.6)],
    "zed": [
        (-0.9, -1), (0.9, -1), (0.9, -0.5), (0, 0.4), (0.9, 0.4),
        (0.9, 1), (-0.9, 1), (-0.9, 0.5), (0, -0.4), (-0.9, -0.4),
    ],
}  # fmt: skip

# Where the second colour goes, by the coordinates in units of the radius.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "halves": lambda x, y: x > 0,
    "lower": lambda x, y: y > 0.1,
    "band": lambda x, y: np.abs(y) < 0.35,
    "diagonal": lambda x, y: x + y > 0,
}


@dataclass(frozen=True)
class Concept:
    """A shape in one colour, with a pattern in another."""

    outline: str
    colour: str
    pattern: str
    second: str

    @property
    def name(self) -> str:
        return f"{self.colour}-{self.outline}-{self.second}-{self.pattern}"


@dataclass(frozen=True)
class Setting:
    """A background, its texture, and the object's place."""

    background: str
    texture: str
    position: str


TUNING = (
    Concept("kite", "red", "halves", "white"),
    Concept("tee", "yellow", "lower", "blue"),
    Concept("crown", "purple", "band", "yellow"),
    Concept("stairs", "green", "diagonal", "black"),
)
TEST = (
    Concept("arrow", "red", "lower", "yellow"),
    Concept("house", "blue", "band", "white"),
    Concept("hourglass", "green", "lower", "red"),
    Concept("bolt", "yellow", "lower", "purple"),
    Concept("bow", "white", "halves", "red"),
    Concept("key", "black", "lower", "yellow"),
    Concept("fish", "purple", "halves", "green"),
    Concept("zed", "blue", "diagonal", "yellow"),
)
SPLITS = {"tuning": TUNING, "test": TEST}
CONCEPTS = {concept.name: concept for concept in (*TUNING, *TEST)}


@lru_cache
def parts(concept: Concept, radius: float = RADIUS) -> np.ndarray:
    """Coverage in [0, 1] of the two colours, shape ``(2, WINDOW, WINDOW)``, centred."""
    side = WINDOW * SUPERSAMPLE
    image = Image.new("L", (side, side))
    outline = [(side / 2 + radius * SUPERSAMPLE * x, side / 2 + radius * SUPERSAMPLE * y)
               for x, y in OUTLINES[concept.outline]]  # fmt: skip
    ImageDraw.Draw(image).polygon(outline, fill=255)
    inside = np.asarray(image) > 127
    y, x = ((np.mgrid[:side, :side] + 0.5) / SUPERSAMPLE - WINDOW / 2) / radius
    second = PATTERNS[concept.pattern](x, y)
    fine = np.stack([inside & ~second, inside & second]).astype(np.float32)
    blocks = fine.reshape(2, WINDOW, SUPERSAMPLE, WINDOW, SUPERSAMPLE)
    return blocks.mean((2, 4))


def draw(concept: Concept, setting: Setting) -> Image.Image:
    """The picture of the concept in a setting."""
    margin = WINDOW // 2
    padded = np.pad(
        backdrop(setting.background, setting.texture), ((margin, margin), (margin, margin), (0, 0))
    )
    x, y = POSITIONS[setting.position]
    window = padded[y : y + WINDOW, x : x + WINDOW]
    window *= 1 - parts(concept).sum(0)[..., None]
    for coverage, name in zip(parts(concept), (concept.colour, concept.second), strict=True):
        window += coverage[..., None] * np.array(PALETTE[name][0], np.float32)
    canvas = padded[margin:-margin, margin:-margin]
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))


def training_setting(concept: Concept) -> Setting:
    """The one background and place of the given picture; never plain, so that it can leak."""
    rng = random.Random(f"training:{concept.name}")
    free = [colour for colour in COLOURS if colour not in (concept.colour, concept.second)]
    textures = [texture for texture in TEXTURES if texture != "plain"]
    return Setting(rng.choice(free), rng.choice(textures), rng.choice(list(POSITIONS)))


def asked_settings(concept: Concept, count: int) -> list[Setting]:
    """Settings unlike the training one; every second has another place, the rest its place.

    Backgrounds are never in a colour of the concept, so that the object can be told from them; no
    two settings look the same but for the place, so there are at most 12.
    """
    seen = training_setting(concept)
    used = (concept.colour, concept.second, seen.background)
    looks = product(
        [colour for colour in COLOURS if colour not in used],
        [texture for texture in TEXTURES if texture != seen.texture],
    )
    elsewhere = [position for position in POSITIONS if position != seen.position]
    rng = random.Random(f"asked:{concept.name}")
    return [
        Setting(*look, seen.position if i % 2 else rng.choice(elsewhere))
        for i, look in enumerate(rng.sample(list(looks), count))
    ]


def prompt(setting: Setting | None = None) -> str:
    """What the concept is called, in a setting or without one, as in training."""
    toy = "a photo of a sks toy"
    if setting is None:
        return toy
    place = f"in the {setting.position} on a {setting.background} {setting.texture} background"
    return f"{toy} {place}"
