"""Customise a tiny text-to-image model from one picture, with LoRA and with T-LoRA.

    python examples/demo.py [--image PATH] [--prompt "a photo of a sks toy"] [--output DIR]

Both adapters get the same picture, seed and number of steps. Afterwards they are reloaded from
disk and asked for the object at other places, on other backgrounds.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch.nn import functional as F
from toybox.check import object_colours, read
from toybox.gate import MODEL, generate
from tqdm import tqdm

from peft_tlora import TLoraConfig

CONCEPT = MODEL.parent / "concept.png"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]
TARGETS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
METHODS = {
    "lora": lambda: LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS),
    "tlora": lambda: TLoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, init_seed=0),
}
TITLES = {"base": "no adapter", "lora": "LoRA", "tlora": "T-LoRA"}
SCENES = [
    ("top left", "green", "dotted"),
    ("bottom right", "white", "plain"),
    ("top right", "purple", "checkered"),
    ("bottom left", "black", "striped"),
    ("top right", "green", "plain"),
    ("bottom left", "yellow", "dotted"),
]
TILE = 192


class PictureError(Exception):
    """A picture that cannot be used; the message says why and what to do."""


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any PIL mode as RGB: transparency on white, more than 8 bits scaled down."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, np.float32)
        top = float(values.max())
        scale = 255 if top <= 1 else 1 if top <= 255 else 255 / max(65535, top)
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def load_picture(path: Path, size: int) -> Image.Image:
    """The picture, upright, centre-cropped to a square and resized.

    Raises:
        PictureError: ``path`` is missing or not a readable picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return ImageOps.fit(to_rgb(file), (size, size), Image.Resampling.LANCZOS)
    except FileNotFoundError:
        problem = "no such file; check the path"
    except IsADirectoryError:
        problem = "this is a folder; give one picture file in it"
    except UnidentifiedImageError:
        problem = "not a picture format Pillow knows; give a PNG or JPEG file"
    except Image.DecompressionBombError:
        problem = "too many pixels; scale it down first"
    except (OSError, SyntaxError, ValueError) as error:
        problem = f"cannot be read ({error}); save it again as PNG"
    raise PictureError(f"--image {path}: {problem}")


def train(
    method: str, picture: Image.Image, prompt: str, folder: Path, *, steps: int, lr: float
) -> float:
    """DreamBooth without prior images on one picture; saves the adapter, returns the seconds."""
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(str(MODEL))
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        part.requires_grad_(False)
    pixels = pipeline.image_processor.preprocess(picture)
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        states = pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
    batch, scheduler = 4, pipeline.scheduler
    latents, states = latents.repeat(batch, 1, 1, 1), states.repeat(batch, 1, 1)
    model = get_peft_model(pipeline.unet, METHODS[method]())
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=1e-4)
    start = time.monotonic()
    for _ in tqdm(range(steps), desc=f"{TITLES[method]:>10}: training", unit="step"):
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps, states).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))
    return time.monotonic() - start


def sample(title: str, adapter: Path | None, prompts: list[str]) -> list[Image.Image]:
    """Generate with a fresh base and the adapter stored at ``adapter``."""
    pipeline = DiffusionPipeline.from_pretrained(str(MODEL))
    if adapter:
        # The layers are injected in place, so the pipeline's own denoiser is now adapted.
        PeftModel.from_pretrained(pipeline.unet, str(adapter))
    desc = f"{title:>10}: {len(prompts)} pictures"
    return generate(pipeline, prompts, seed=100, guidance=1.5, desc=desc)


def follow_rates(pictures: list[Image.Image], given: Image.Image) -> dict[str, float]:
    """Shares of pictures at the asked place and on the asked background, and likeness.

    Likeness is the overlap of the object's palette histogram with that of the given picture.
    """
    asked = [SCENES[i % len(SCENES)] for i in range(len(pictures))]
    readings = [read(picture) for picture in pictures]
    pairs = list(zip(readings, asked, strict=True))
    concept = object_colours(given)
    likeness = [np.minimum(concept, object_colours(picture)).sum() for picture in pictures]
    return {
        "background": float(np.mean([r.background == a[1] for r, a in pairs])),
        "texture": float(np.mean([r.background == a[1] and r.texture == a[2] for r, a in pairs])),
        "position": float(np.mean([r.position == a[0] for r, a in pairs])),
        "likeness": float(np.mean(likeness)),
    }


def draw_sheet(given: Image.Image, rows: dict[str, list[Image.Image]]) -> Image.Image:
    """The given picture, and a labelled row for each method."""
    margin, label, step = 8, 18, TILE + 8
    titles = margin + step  # the column with the rows' titles, after the given picture
    first = titles + 72
    size = (first + step * len(SCENES), 2 * label + margin + step * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    def paste(picture: Image.Image, left: int, top: int) -> None:
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.NEAREST), (left, top))

    for column, (position, background, texture) in enumerate(SCENES):
        left = first + column * step
        draw.text((left, 6), f"... in the {position}", fill="black")
        draw.text((left, 6 + label), f"on a {background} {texture} background", fill="black")
    top = 2 * label + margin
    draw.text((margin, 6 + label), "the given picture", fill="black")
    paste(given, margin, top)
    for row, (method, pictures) in enumerate(rows.items()):
        y = top + row * step
        draw.text((titles, y + TILE // 2), TITLES[method], fill="black", anchor="lm")
        for column, picture in enumerate(pictures[: len(SCENES)]):
            paste(picture, first + column * step, y)
    return sheet


def main() -> None:
    """Train both adapters, reload them, and compare what they generate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=CONCEPT)
    parser.add_argument("--prompt", default="a photo of a sks toy")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=4, help="pictures a prompt, for the shares")
    args = parser.parse_args()
    try:
        given = load_picture(args.image, 64)
    except PictureError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    args.output.mkdir(parents=True, exist_ok=True)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    prompts = [f"{args.prompt} in the {p} on a {b} {t} background" for p, b, t in SCENES]
    rows = {"base": sample(TITLES["base"], None, prompts)}
    shares = {}
    for method in METHODS:
        folder = args.output / method
        seconds = train(method, given, args.prompt, folder, steps=args.steps, lr=args.lr)
        rows[method] = sample(TITLES[method], folder, prompts * args.seeds)
        shares[method] = {**follow_rates(rows[method], given), "seconds": seconds}
    draw_sheet(given, rows).save(args.output / "demo.png")
    count = len(SCENES) * args.seeds
    print(
        f"Shares of {count} pictures with what was asked: the background's colour, also its "
        "texture, the object's place. Likeness of the object's colours to the given ones, 0 to 1."
    )
    for method, values in shares.items():
        print(f"{TITLES[method]:>7}: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
    print(f"wrote {args.output / 'demo.png'}, {', '.join(str(args.output / m) for m in METHODS)}")


if __name__ == "__main__":
    main()
