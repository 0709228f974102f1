"""Read the attributes of a toybox picture exactly, without any learned model.

Pixels go to the nearest palette tone: the most frequent colour is the background, the rest is the
object. Its shape is the best overlap with the drawn outlines, its position the nearest place.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from toybox.scenes import (
    COLOURS,
    PALETTE,
    POSITIONS,
    SHAPES,
    SIZE,
    TEXTURES,
    Scene,
    object_mask,
    texture_mask,
)

ATTRIBUTES = ("background", "shape", "colour", "position", "texture")
MIN_OBJECT_PIXELS = 60
MIN_OVERLAP = 0.6
_TONES = np.array([tone for tones in PALETTE.values() for tone in tones], np.float32)


@dataclass(frozen=True)
class Reading:
    """What a picture shows; ``None`` where nothing fits."""

    background: str
    texture: str
    shape: str | None = None
    colour: str | None = None
    position: str | None = None
    overlap: float = 0.0

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Which attributes are those of ``scene``."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


def palette_map(picture: Image.Image) -> np.ndarray:
    """Index into ``COLOURS`` of every pixel, shape ``(SIZE, SIZE)``."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    distance = ((pixels[:, :, None] - _TONES) ** 2).sum(-1)
    return distance.argmin(-1) // 2


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """The biggest 4-connected region of a boolean mask (labels spread until they settle)."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = np.maximum.reduce(
            [labels, padded[2:, 1:-1], padded[:-2, 1:-1], padded[1:-1, 2:], padded[1:-1, :-2]]
        )
        spread = np.where(mask, spread, 0)
        if (spread == labels).all():
            break
        labels = spread
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return labels == counts.argmax() if counts.any() else mask


def object_mask_of(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The palette map, and the largest region that is not of the most frequent colour."""
    indices = palette_map(picture)
    return indices, _largest_component(indices != np.bincount(indices.ravel()).argmax())


def object_colours(picture: Image.Image) -> np.ndarray:
    """The object's palette histogram, shape ``(len(COLOURS),)``; it sums to one."""
    indices, mask = object_mask_of(picture)
    counts = np.bincount(indices[mask], minlength=len(COLOURS))
    return counts / max(1, counts.sum())


def shape_overlap(mask: np.ndarray, shape: str) -> float:
    """The best intersection over union of ``mask`` with the shape at any size near the mask."""
    ys, xs = np.nonzero(mask)
    centre_x, centre_y = (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2
    best = 0.0
    for size in (12.0, 13.0, 14.0, 15.0, 16.0):
        template = object_mask(shape, SIZE / 2, SIZE / 2, size) > 0.5
        rows, columns = np.nonzero(template)
        dx = round(centre_x - (columns.min() + columns.max() + 1) / 2)
        dy = round(centre_y - (rows.min() + rows.max() + 1) / 2)
        for shift_y in (dy - 1, dy, dy + 1):
            for shift_x in (dx - 1, dx, dx + 1):
                moved = np.roll(template, (shift_y, shift_x), (0, 1))
                best = max(best, float((mask & moved).sum() / (mask | moved).sum()))
    return best


def read_texture(picture: Image.Image, background: str, free: np.ndarray) -> str:
    """The texture that best explains the two tones on the ``free`` background pixels."""
    main, second = (np.array(tone, np.float32) for tone in PALETTE[background])
    axis = second - main
    tone = (np.asarray(picture.convert("RGB"), np.float32)[free] - main) @ axis / (axis @ axis)
    residuals = {t: float(np.mean((tone - texture_mask(t)[free]) ** 2)) for t in TEXTURES}
    return min(residuals, key=lambda texture: residuals[texture])


def read(picture: Image.Image) -> Reading:
    """Read one ``SIZE`` x ``SIZE`` picture."""
    indices, mask = object_mask_of(picture)
    background = int(np.bincount(indices.ravel()).argmax())
    name = COLOURS[background]
    texture = read_texture(picture, name, indices == background)
    if not MIN_OBJECT_PIXELS <= mask.sum() <= mask.size // 3:
        return Reading(name, texture)
    colour = COLOURS[int(np.bincount(indices[mask], minlength=len(COLOURS)).argmax())]
    ys, xs = np.nonzero(mask)
    position = min(
        POSITIONS, key=lambda p: np.hypot(xs.mean() - POSITIONS[p][0], ys.mean() - POSITIONS[p][1])
    )
    overlaps = {shape: shape_overlap(mask, shape) for shape in SHAPES}
    shape = max(overlaps, key=lambda s: overlaps[s])
    found = shape if overlaps[shape] >= MIN_OVERLAP else None
    return Reading(name, texture, found, colour, position, overlaps[shape])
