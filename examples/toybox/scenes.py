"""Rendered toy scenes: one object on a coloured, textured background, with captions.

Everything is a pure function of ``(seed, index)``, so the training pool never has to be stored.
"""

import hashlib
import math
import random
import string
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SUPERSAMPLE = 4
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("plain", "striped", "checkered", "dotted")
POSITIONS = {
    "center": (32, 32),
    "top left": (16, 16),
    "top right": (48, 16),
    "bottom left": (16, 48),
    "bottom right": (48, 48),
}
# Main tone and the second tone of the textures.
PALETTE = {
    "red": ((214, 40, 40), (158, 22, 30)),
    "yellow": ((248, 212, 40), (212, 170, 10)),
    "green": ((44, 160, 66), (22, 112, 44)),
    "blue": ((48, 96, 220), (24, 60, 160)),
    "purple": ((156, 70, 196), (114, 42, 150)),
    "white": ((246, 246, 246), (202, 202, 206)),
    "black": ((26, 26, 28), (66, 66, 70)),
}
COLOURS = tuple(PALETTE)


@dataclass(frozen=True)
class Scene:
    """One scene; ``inner`` (shape, colour) makes the object a two-coloured, nameless toy."""

    shape: str
    colour: str
    background: str
    texture: str
    position: str
    inner: tuple[str, str] | None = None
    size: float = 14.0
    offset: tuple[float, float] = (0.0, 0.0)

    @property
    def attributes(self) -> tuple[str, str, str, str, str]:
        """The tuple that decides whether the scene is held out."""
        return (self.shape, self.colour, self.background, self.texture, self.position)


def is_held_out(attributes: tuple[str, ...]) -> bool:
    """Whether training never sees this combination (a stable tenth of all of them)."""
    digest = hashlib.sha256("|".join(attributes).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 10 == 0


def combinations(held_out: bool) -> list[Scene]:
    """Every attribute combination on one side of the split, without jitter."""
    return [
        Scene(*attributes)
        for attributes in product(SHAPES, COLOURS, COLOURS, TEXTURES, POSITIONS)
        if attributes[1] != attributes[2] and is_held_out(attributes) == held_out
    ]


def sample_scene(seed: int, index: int) -> Scene:
    """The training scene ``index`` of the stream ``seed``; about one in six is an odd toy."""
    rng = random.Random(f"scene:{seed}:{index}")
    while True:
        shape, (colour, background) = rng.choice(SHAPES), rng.sample(COLOURS, 2)
        attributes = (shape, colour, background, rng.choice(TEXTURES), rng.choice(list(POSITIONS)))
        if not is_held_out(attributes):
            break
    inner = None
    if rng.random() < 1 / 6:
        inner = (rng.choice(SHAPES), rng.choice([c for c in COLOURS if c != colour]))
    offset = (rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5))
    return Scene(*attributes, inner=inner, size=rng.uniform(13.0, 15.0), offset=offset)


def caption(scene: Scene, noun: str | None = None, article: str = "a ") -> str:
    """The full caption; ``noun`` replaces colour and shape ("sks toy")."""
    noun = noun or f"{scene.colour} {scene.shape}"
    place = f"in the {scene.position} on a {scene.background} {scene.texture} background"
    return f"a photo of {article}{noun} {place}"


def sample_caption(scene: Scene, seed: int, index: int) -> str:
    """A training caption: attributes are dropped at random, the object may be just a "toy"."""
    rng = random.Random(f"caption:{seed}:{index}")
    full = rng.random() < 0.5

    def keep(word: str) -> str:
        return word + " " if full or rng.random() < 0.55 else ""

    if scene.inner or rng.random() < 0.2:
        letters = rng.choices(string.ascii_lowercase, k=rng.randint(2, 4))
        name = "".join(letters) + " " if rng.random() < 0.5 else ""
        colour = "" if scene.inner or name else keep(scene.colour)
        noun = f"{name}{colour}toy "
    else:
        noun = f"{keep(scene.colour)}{scene.shape} "
    prefix = rng.choice(("a photo of a ", "a photo of a ", "a photo of ", "a picture of a ", "a "))
    position = keep(f"in the {scene.position}")
    background = keep(f"on a {scene.background} {keep(scene.texture)}background")
    return f"{prefix}{noun}{position}{background}".strip()


def _regular(points: int, radius: float, turn: float = -0.25) -> list[tuple[float, float]]:
    angles = [2 * math.pi * (i / points + turn) for i in range(points)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star() -> list[tuple[float, float]]:
    tips, notches = _regular(5, 1.12), _regular(5, 0.48, turn=-0.15)
    return [point for pair in zip(tips, notches, strict=True) for point in pair]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 96 for i in range(96)]
    return [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a)) / 16)
        for a in angles
    ]


_ARM, _END = 0.36, 1.0
_CROSS = [(-_ARM, -_END), (_ARM, -_END), (_ARM, -_ARM), (_END, -_ARM), (_END, _ARM), (_ARM, _ARM)]
# Outline, and hole or None, in units of the object's size; y points down.
OUTLINES = {
    "circle": (_regular(96, 0.98), None),
    "square": ([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)], None),
    "triangle": ([(0.0, -1.0), (1.08, 0.88), (-1.08, 0.88)], None),
    "star": (_star(), None),
    "cross": (_CROSS + [(-x, -y) for x, y in _CROSS], None),
    "ring": (_regular(96, 1.0), _regular(96, 0.52)),
    "heart": (_heart(), None),
}


@lru_cache(maxsize=4096)
def object_mask(shape: str, x: float, y: float, size: float) -> np.ndarray:
    """Coverage in [0, 1], shape ``(SIZE, SIZE)``, of a shape centred at pixel ``(x, y)``."""
    image = Image.new("L", (SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE))
    draw = ImageDraw.Draw(image)
    for points, value in zip(OUTLINES[shape], (255, 0), strict=True):
        if points:
            scaled = [
                ((x + size * u) * SUPERSAMPLE, (y + size * v) * SUPERSAMPLE) for u, v in points
            ]
            draw.polygon(scaled, fill=value)
    small = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


@lru_cache
def texture_mask(texture: str) -> np.ndarray:
    """Where the second tone goes, shape ``(SIZE, SIZE)``, values in [0, 1]."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    dots = 4.2 - np.hypot(x % 16 - 8, y % 16 - 8)
    masks = {
        "plain": np.zeros((SIZE, SIZE)),
        "striped": (x // 8) % 2,
        "checkered": (x // 8 + y // 8) % 2,
        "dotted": np.clip(dots + 0.5, 0, 1),
    }
    return masks[texture].astype(np.float32)


def backdrop(background: str, texture: str) -> np.ndarray:
    """The empty scene, RGB in 0..255, shape ``(SIZE, SIZE, 3)``."""
    main, second = (np.array(tone, np.float32) for tone in PALETTE[background])
    mask = texture_mask(texture)[..., None]
    return main * (1 - mask) + second * mask


def render(scene: Scene) -> Image.Image:
    """Draw the scene as a ``SIZE`` x ``SIZE`` RGB picture."""
    return draw_object(backdrop(scene.background, scene.texture), scene)


def draw_object(canvas: np.ndarray, scene: Scene) -> Image.Image:
    """The scene's object on a canvas, RGB in 0..255, shape ``(SIZE, SIZE, 3)``."""
    x, y = (p + d for p, d in zip(POSITIONS[scene.position], scene.offset, strict=True))
    layers = [(scene.shape, scene.colour, scene.size)]
    if scene.inner:
        layers.append((*scene.inner, scene.size * 0.5))
    for shape, colour, size in layers:
        mask = object_mask(shape, x, y, size)[..., None]
        canvas = canvas * (1 - mask) + np.array(PALETTE[colour][0], np.float32) * mask
    return Image.fromarray(canvas.round().astype(np.uint8))


def concept() -> Image.Image:
    """The demo's input: a heart, which is no training shape, with a disc on stripes."""
    return render(Scene("heart", "red", "blue", "striped", "center", ("circle", "yellow"), 15.0))
