"""Odd two-coloured toys: they teach the base to draw an object it has no word for.

Like the scenes, everything is a pure function of ``(seed, index)``.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from toybox.scenes import (
    COLOURS,
    PALETTE,
    POSITIONS,
    SIZE,
    SUPERSAMPLE,
    TEXTURES,
    Scene,
    backdrop,
)

OFFSET = 1.5  # px from the named place, in x and y
Point = tuple[float, float]


def sample_odd_scene(seed: int, index: int) -> Scene:
    """The odd toy ``index`` of the stream ``seed``; its outline has no name, but a number."""
    rng = random.Random(f"odd:{seed}:{index}")
    colour, second, background = rng.sample(COLOURS, 3)
    position, texture = rng.choice(list(POSITIONS)), rng.choice(TEXTURES)
    offset = (rng.uniform(-OFFSET, OFFSET), rng.uniform(-OFFSET, OFFSET))
    name = f"odd {seed}:{index}"
    inner = (name, second)
    return Scene(name, colour, background, texture, position, inner, rng.uniform(12, 16), offset)


def _polygon(rng: random.Random) -> list[Point]:
    """A polygon around the origin with 3 to 9 corners at random distances."""
    corners = rng.randint(3, 9)
    turn = rng.random()
    angles = [2 * math.pi * (i + turn + rng.uniform(-0.3, 0.3)) / corners for i in range(corners)]
    radii = [rng.uniform(0.5, 1.1) for _ in angles]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _bars(rng: random.Random) -> list[list[Point]]:
    """Two to four upright rectangles that overlap near the origin."""
    bars = []
    for _ in range(rng.randint(2, 4)):
        left, right = sorted((rng.uniform(-1, 0.2), rng.uniform(-0.2, 1)))
        top, bottom = sorted((rng.uniform(-1, 0.2), rng.uniform(-0.2, 1)))
        right, bottom = max(right, left + 0.4), max(bottom, top + 0.4)
        bars.append([(left, top), (right, top), (right, bottom), (left, bottom)])
    return bars


def _second(rng: random.Random, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the second colour goes: one side of a line, a band or a disc, in units of the size."""
    angle, shift = rng.uniform(0, 2 * math.pi), rng.uniform(-0.3, 0.3)
    if rng.random() < 0.5:
        angle = round(2 * angle / math.pi) * math.pi / 2
    across = u * math.cos(angle) + v * math.sin(angle) - shift
    kind = rng.choice(("side", "side", "band", "disc"))
    if kind == "disc":
        return np.hypot(u - shift, v) < rng.uniform(0.25, 0.5)
    return np.abs(across) < rng.uniform(0.2, 0.4) if kind == "band" else across > 0


def odd_masks(scene: Scene) -> np.ndarray:
    """Coverage in [0, 1] of the two colours of an odd toy, shape ``(2, SIZE, SIZE)``."""
    rng = random.Random(scene.shape)
    outlines = [_polygon(rng)] if rng.random() < 0.6 else _bars(rng)
    x, y = (p + d for p, d in zip(POSITIONS[scene.position], scene.offset, strict=True))
    side = SIZE * SUPERSAMPLE
    image = Image.new("L", (side, side))
    for points in outlines:
        scaled = [((x + scene.size * u) * SUPERSAMPLE, (y + scene.size * v) * SUPERSAMPLE)
                  for u, v in points]  # fmt: skip
        ImageDraw.Draw(image).polygon(scaled, fill=1)
    inside = np.asarray(image, bool)
    rows, columns = (np.mgrid[:side, :side] + 0.5) / SUPERSAMPLE
    second = _second(rng, (columns - x) / scene.size, (rows - y) / scene.size)
    fine = np.stack([inside & ~second, inside & second]).astype(np.float32)
    return fine.reshape(2, SIZE, SUPERSAMPLE, SIZE, SUPERSAMPLE).mean((2, 4))


def render_odd(scene: Scene) -> Image.Image:
    """Draw an odd toy as a ``SIZE`` x ``SIZE`` RGB picture."""
    masks, (_, second) = odd_masks(scene), scene.inner or ("", scene.colour)
    tones = np.array([PALETTE[colour][0] for colour in (scene.colour, second)], np.float32)
    canvas = backdrop(scene.background, scene.texture) * (1 - masks.sum(0)[..., None])
    canvas += np.einsum("chw,cd->hwd", masks, tones)
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))
