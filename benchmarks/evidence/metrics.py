"""Exact measures of a picture: whether it shows the concept, and whether it shows what was asked.

Pixels go to the nearest palette colour. A concept is looked for at every place and three sizes; its
fidelity is the overlap (intersection over union) of each of its colours with the drawn template.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from toybox.check import palette_map, read
from toybox.scenes import COLOURS, PALETTE, SIZE

from evidence.concepts import CONCEPTS, RADIUS, WINDOW, Concept, Setting, parts
from evidence.encoder import GREY

SIZES = (RADIUS - 1, RADIUS, RADIUS + 1)
PADDED = SIZE + WINDOW
FOUND = 0.3  # the overlap from which the concept counts as found; random pictures stay below
ASPECTS = ("background", "texture", "position")
_MARGIN = WINDOW // 2


@dataclass(frozen=True)
class Match:
    """Where a concept fits best: overlap in [0, 1], top left corner in the padded picture, size."""

    overlap: float
    x: int
    y: int
    radius: float


@lru_cache(maxsize=256)
def _spectra(concept: Concept) -> tuple[np.ndarray, np.ndarray]:
    """Conjugate spectra ``(sizes, 2, ...)`` of the templates, and their areas ``(sizes, 2)``."""
    masks = np.stack([parts(concept, radius) for radius in SIZES]) > 0.5
    spectra = np.conj(np.fft.rfft2(masks.astype(np.float32), s=(PADDED, PADDED)))
    return spectra, masks.sum((2, 3))


@lru_cache
def _window_spectrum() -> np.ndarray:
    return np.conj(np.fft.rfft2(np.ones((WINDOW, WINDOW), np.float32), s=(PADDED, PADDED)))


def _padded(indices: np.ndarray) -> np.ndarray:
    """Which pixels have each colour, ``(colours, PADDED, PADDED)``."""
    layers = indices == np.arange(len(COLOURS))[:, None, None]
    return np.pad(layers, ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN))).astype(np.float32)


def match(indices: np.ndarray, concept: Concept) -> Match:
    """The best fit of a concept in a palette map.

    Each colour's union counts the picture's pixels of that colour in the concept's window, so a
    background in one of its colours does not pass for the concept.
    """
    layers = _padded(indices)[[COLOURS.index(concept.colour), COLOURS.index(concept.second)]]
    spectrum = np.fft.rfft2(layers)
    templates, areas = _spectra(concept)
    shape = (PADDED, PADDED)
    common = np.fft.irfft2(spectrum * templates, s=shape)
    present = np.fft.irfft2(spectrum * _window_spectrum(), s=shape)
    union = present + areas[..., None, None] - common
    overlap = (common / union).mean(1)[:, : SIZE + 1, : SIZE + 1]
    size, y, x = np.unravel_index(overlap.argmax(), overlap.shape)
    return Match(float(overlap.max()), int(x), int(y), SIZES[size])


def decoys(concept: Concept) -> list[Concept]:
    """What the concept is easily confused with: its own shape with the colours exchanged."""
    return [Concept(concept.outline, concept.second, concept.pattern, concept.colour)]


def is_identified(indices: np.ndarray, concept: Concept) -> bool:
    """Whether the concept fits better than every other one and than its decoys."""
    own = match(indices, concept).overlap
    others = [c for c in (*CONCEPTS.values(), *decoys(concept)) if c != concept]
    return own >= FOUND and own > max(match(indices, other).overlap for other in others)


def _window(picture: Image.Image, found: Match) -> np.ndarray:
    """The pixels where the concept fits best, ``(WINDOW, WINDOW, 3)``."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    padded = np.pad(pixels, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)))
    return padded[found.y : found.y + WINDOW, found.x : found.x + WINDOW]


def masked_rmse(picture: Image.Image, concept: Concept, found: Match) -> float:
    """Root mean square error of the object's pixels where the concept fits best, in [0, 1]."""
    coverage = parts(concept, found.radius)
    tones = np.array([PALETTE[c][0] for c in (concept.colour, concept.second)], np.float32)
    inside = coverage.sum(0) > 0.99
    truth = np.einsum("chw,cd->hwd", coverage, tones)
    return float(np.sqrt(((_window(picture, found) - truth)[inside] ** 2).mean()) / 255)


def cut_out(picture: Image.Image, found: Match, concept: Concept) -> Image.Image:
    """The found object alone, centred on grey: what the encoder compares."""
    coverage = parts(concept, found.radius).sum(0)[..., None]
    canvas = np.full((SIZE, SIZE, 3), GREY, np.float32)
    inside = slice((SIZE - WINDOW) // 2, (SIZE + WINDOW) // 2)
    canvas[inside, inside] += coverage * (_window(picture, found) - GREY)
    return Image.fromarray(canvas.round().astype(np.uint8))


def measure(
    picture: Image.Image, concept: Concept, asked: Setting | None, seen: Setting
) -> dict[str, float]:
    """All exact measures of one picture, as numbers in [0, 1].

    Args:
        picture: The generated picture.
        concept: What it should show.
        asked: Where it should show it; without it, there is no alignment.
        seen: The setting of the training picture, for the leakage.
    """
    indices, reading = palette_map(picture), read(picture)
    found = match(indices, concept)
    values = {
        "overlap": found.overlap,
        "identity": float(is_identified(indices, concept)),
        "rmse": masked_rmse(picture, concept, found),
        "leak_background": float(reading.background == seen.background),
        "leak_position": float(reading.position == seen.position),
        "leak_texture": float(reading.texture == seen.texture),
    }
    values["leakage"] = values["leak_background"] / 2 + values["leak_position"] / 2
    if asked is not None:
        for name in ASPECTS:
            values[f"right_{name}"] = float(getattr(reading, name) == getattr(asked, name))
        values["alignment"] = float(np.mean([values[f"right_{name}"] for name in ASPECTS]))
    return values
