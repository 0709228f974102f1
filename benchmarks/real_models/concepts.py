"""The pictures that adapters are trained on, and the prompts they are asked."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

CONTEXTS = (
    "on the beach", "in the jungle", "in the snow", "on a wooden floor", "in a city street",
    "on top of a pink fabric", "with mountains in the background", "floating on water",
)  # fmt: skip
UNRELATED = (
    "a photo of a red bus in a city",
    "a bowl of fruit on a table",
    "a portrait of an old man",
    "a castle on a hill at night",
)


@dataclass(frozen=True)
class Picture:
    """A concept: its name, the class's name, its picture, and the picture without background."""

    name: str
    noun: str
    image: Image.Image
    masked: Image.Image


def load_concepts(folder: Path, size: int) -> list[Picture]:
    """All concepts of a folder, cropped to squares.

    Raises:
        ValueError: The folder has no concepts.
    """
    found = []
    for path in sorted(folder.glob("*/image.*")):
        image = ImageOps.fit(Image.open(path).convert("RGB"), (size, size))
        mask, masked = path.with_name("mask.png"), image
        if mask.exists():
            inside = ImageOps.fit(Image.open(mask).convert("L"), (size, size))
            masked = Image.composite(image, Image.new("RGB", image.size, "white"), inside)
        noun = path.with_name("class.txt").read_text().strip()
        found.append(Picture(path.parent.name, noun, image, masked))
    if not found:
        raise ValueError(f"{folder} has no CONCEPT/image.png; make a folder for each concept")
    return found


def caption(concept: Picture, context: str = "") -> str:
    return f"a photo of a sks {concept.noun} {context}".strip()
