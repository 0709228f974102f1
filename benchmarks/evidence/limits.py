"""Ceiling and floor of every measure: true pictures, their reconstructions, and random ones."""

from functools import lru_cache

import numpy as np
from PIL import Image
from toybox.gate import reconstruct
from toybox.scenes import SIZE, render, sample_scene

from evidence.concepts import SPLITS, Concept, asked_settings, draw, training_setting
from evidence.store import Record
from evidence.trial import ASKED, FREE, UNRELATED, fresh_pipeline, judge


def _scenes(start: int) -> list[Image.Image]:
    """Scenes of the base's domain that have nothing to do with the prompts."""
    return [render(sample_scene(99, start + i)) for i in range(max(ASKED, FREE, len(UNRELATED)))]


def true_pictures(concept: Concept) -> dict[str, list[Image.Image]]:
    """What a perfect model would make: the concept as asked, and anywhere for the bare prompt."""
    asked = [draw(concept, setting) for setting in asked_settings(concept, ASKED)]
    return {"asked": asked, "free": asked[:FREE], "unrelated": _scenes(0)[: len(UNRELATED)]}


def noise_pictures(seed: int) -> dict[str, list[Image.Image]]:
    rng = np.random.default_rng(seed)
    sizes = {"asked": ASKED, "free": FREE, "unrelated": len(UNRELATED)}
    shape = (SIZE, SIZE, 3)
    return {
        name: [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(count)]
        for name, count in sizes.items()
    }


def scene_pictures(seed: int) -> dict[str, list[Image.Image]]:
    other = _scenes(1000 * (seed + 1))
    return {"asked": other[:ASKED], "free": other[:FREE], "unrelated": other[: len(UNRELATED)]}


def memorised_pictures(concept: Concept) -> dict[str, list[Image.Image]]:
    """The worst overfitting: the given picture, whatever is asked."""
    given = draw(concept, training_setting(concept))
    return {"asked": [given] * ASKED, "free": [given] * FREE, "unrelated": [given] * len(UNRELATED)}


@lru_cache
def measure_limits() -> dict[str, list[Record]]:
    """The measures of each kind of picture, a record for each test concept."""
    kinds: dict[str, list[Record]] = {}
    pipeline = fresh_pipeline("cpu")
    for number, concept in enumerate(SPLITS["test"]):
        true = true_pictures(concept)
        candidates = {
            "true pictures": true,
            "after the autoencoder": {k: reconstruct(pipeline, v) for k, v in true.items()},
            "the given picture, always": memorised_pictures(concept),
            "random scenes": scene_pictures(number),
            "noise": noise_pictures(number),
        }
        for name, pictures in candidates.items():
            values = judge(pictures, concept, true["unrelated"])
            kinds.setdefault(name, []).append({"concept": concept.name, "seed": 0, **values})
    return kinds
