"""Measure how well the toybox follows prompts it has not seen, with an exact checker.

cd examples && python -m toybox.gate
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from toybox.check import ATTRIBUTES, read
from toybox.scenes import SIZE, Scene, caption, combinations, render

MODEL = Path(__file__).parent / "model"
THRESHOLDS = {
    "background": 0.97,
    "shape": 0.90,
    "colour": 0.95,
    "position": 0.90,
    "texture": 0.95,
}


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """``count`` different attribute combinations that training never saw."""
    return random.Random(seed).sample(combinations(held_out=True), count)


def generate(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seed: int = 0,
    steps: int = 25,
    guidance: float = 3.5,
    batch: int = 25,
    desc: str | None = None,
) -> list[Image.Image]:
    """Generate one picture a prompt; picture ``i`` starts from the noise of ``seed + i``.

    A progress bar shows the steps of each batch if there is a ``desc`` to put before it.
    """
    pipeline.set_progress_bar_config(disable=desc is None, desc=desc)
    pictures = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        pictures += pipeline(
            chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generators
        ).images
    return pictures


def score(pictures: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """The share of pictures that show each attribute of their scene, and all of them at once."""
    agreements = [read(p).agrees(s) for p, s in zip(pictures, scenes, strict=True)]
    rates = {name: sum(a[name] for a in agreements) / len(agreements) for name in ATTRIBUTES}
    rates["all"] = sum(all(a.values()) for a in agreements) / len(agreements)
    return rates


@torch.no_grad()
def reconstruct(pipeline: DiffusionPipeline, pictures: list[Image.Image]) -> list[Image.Image]:
    """The pictures after a round trip through the autoencoder."""
    x = pipeline.image_processor.preprocess(pictures).to(pipeline.vae.dtype)
    decoded = [
        pipeline.vae.decode(pipeline.vae.encode(x_.unsqueeze(0)).latent_dist.mean).sample
        for x_ in x
    ]
    return pipeline.image_processor.postprocess(torch.cat(decoded))


def contact_sheet(pictures: list[Image.Image], columns: int = 10, scale: int = 2) -> Image.Image:
    """The pictures as one grid."""
    rows, tile = -(-len(pictures) // columns), SIZE * scale + 4
    sheet = Image.new("RGB", (columns * tile, rows * tile), "white")
    for i, picture in enumerate(pictures):
        big = picture.resize((SIZE * scale,) * 2, Image.Resampling.NEAREST)
        sheet.paste(big, (i % columns * tile, i // columns * tile))
    return sheet


def main() -> None:
    """Print the table, write the JSON, and exit with 1 when a threshold is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here")
    args = parser.parse_args()

    pipeline = DiffusionPipeline.from_pretrained(str(args.model))
    scenes = held_out_scenes(args.prompts, args.seed)
    truth = [render(scene) for scene in scenes]
    start = time.monotonic()
    prompts = [caption(scene) for scene in scenes]
    pictures = generate(pipeline, prompts, args.seed, args.steps, args.guidance)
    seconds = time.monotonic() - start
    rates = {
        "model": score(pictures, scenes),
        "autoencoder ceiling": score(reconstruct(pipeline, truth), scenes),
        "render ceiling": score(truth, scenes),
    }
    print("".join(f"{name:>21}" for name in ("", *rates, "threshold")))
    for name in (*ATTRIBUTES, "all"):
        cells = "".join(f"{rates[column][name]:21.3f}" for column in rates)
        print(f"{name:>21}{cells}{THRESHOLDS.get(name, '-'):>21}")
    passed = all(rates["model"][name] >= limit for name, limit in THRESHOLDS.items())
    print(f"{args.prompts} prompts in {seconds:.0f} s; gate {'passed' if passed else 'MISSED'}")
    if args.sheet:
        contact_sheet(pictures[:60]).save(args.sheet)
    if args.json:
        settings = {key: getattr(args, key) for key in ("prompts", "seed", "steps", "guidance")}
        report = {"passed": passed, "seconds": round(seconds, 1), **settings, "rates": rates}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
