"""The paper's protocol on SDXL: the same arms and tables, CLIP and DINO for the similarities.

    PYTHONPATH=examples python benchmarks/sdxl_single_image.py --concepts FOLDER --output DIR

``--concepts`` holds a folder for each concept with ``image.png``, ``class.txt`` (the class's name,
"toy") and, if the background is to be masked, ``mask.png`` (white on the object). Trials that are
in the results are skipped. The real model needs a GPU of about 24 GB.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from evidence import store, tables
from evidence.arms import ARMS, BASE, CORE
from evidence.plan import Plan, variants
from evidence.store import Record
from evidence.training import acting_in, attach, fit
from evidence.trial import Cell
from PIL import Image, ImageOps
from torch.nn import functional as F
from tqdm import tqdm

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RATE = 1e-4  # the paper's, for every arm
STEPS = (500, 800)  # the paper's for LoRA and Vanilla, and for T-LoRA; here every arm has both
SAMPLING = {"num_inference_steps": 25, "guidance_scale": 5.0}
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
NAMES = {
    "overlap": "CLIP image",
    "dino": "DINO image",
    "alignment": "CLIP text",
    "drift": "drift",
}


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


class Judge:
    """CLIP and DINO, for pictures and prompts."""

    def __init__(self, clip: Any, clip_processor: Any, dino: Any, dino_processor: Any) -> None:
        self.clip, self.clip_processor = clip.eval(), clip_processor
        self.dino, self.dino_processor = dino.eval(), dino_processor

    @classmethod
    def pretrained(cls, device: str) -> "Judge":
        from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

        clip: Any = CLIPModel.from_pretrained(CLIP)  # its `to` is typed as a bare function
        return cls(
            clip.to(device),
            CLIPProcessor.from_pretrained(CLIP),
            AutoModel.from_pretrained(DINO).to(device),
            AutoImageProcessor.from_pretrained(DINO),
        )

    @torch.no_grad()
    def clip_images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Unit features, ``(batch, features)``."""
        inputs = self.clip_processor(images=list(pictures), return_tensors="pt")
        states = self.clip.vision_model(**inputs.to(self.clip.device)).pooler_output
        return F.normalize(self.clip.visual_projection(states), dim=-1)

    @torch.no_grad()
    def clip_texts(self, texts: Sequence[str]) -> torch.Tensor:
        inputs = self.clip_processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True
        )
        states = self.clip.text_model(**inputs.to(self.clip.device)).pooler_output
        return F.normalize(self.clip.text_projection(states), dim=-1)

    @torch.no_grad()
    def dino_images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        inputs = self.dino_processor(images=list(pictures), return_tensors="pt")
        states = self.dino(**inputs.to(self.dino.device)).last_hidden_state[:, 0]
        return F.normalize(states, dim=-1)


def caption(concept: Picture, context: str = "") -> str:
    return f"a photo of a sks {concept.noun} {context}".strip()


def conditions_of(pipeline: Any, text: str, size: int) -> dict[str, Any]:
    """SDXL's conditions of one prompt at full size, uncropped."""
    device = pipeline.unet.device
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(
            text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    times = torch.tensor([[size, size, 0, 0, size, size]], device=device, dtype=states.dtype)
    added = {"text_embeds": pooled, "time_ids": times}
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


@torch.no_grad()
def encode(pipeline: Any, image: Image.Image) -> torch.Tensor:
    pixels = pipeline.image_processor.preprocess(image).to(pipeline.vae.device, pipeline.vae.dtype)
    latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    return latents.to(pipeline.unet.dtype)


def generate(pipeline: Any, prompts: Sequence[str], seed: int, size: int) -> list[Image.Image]:
    """A picture for each prompt; picture i starts from the noise of ``1000 (seed + 1) + i``."""
    pipeline.set_progress_bar_config(disable=True)
    return [
        pipeline(
            text, height=size, width=size, **SAMPLING,
            generator=torch.Generator().manual_seed(1000 * (seed + 1) + i),
        ).images[0]
        for i, text in enumerate(prompts)
    ]  # fmt: skip


def measure(
    pipeline: Any, concept: Picture, seed: int, judge: Judge, base: list[Image.Image]
) -> Record:
    """The paper's similarities over the contexts, and PEFT's drift from the base's pictures."""
    size = concept.image.width
    plain = [f"a photo of a {concept.noun} {context}" for context in CONTEXTS]
    asked = [caption(concept, context) for context in CONTEXTS]
    made = generate(pipeline, asked, seed, size)
    moved = judge.dino_images(generate(pipeline, UNRELATED, seed, size)) * judge.dino_images(base)
    given = [concept.masked]
    likeness = judge.clip_images(made) @ judge.clip_images(given).T
    dino = judge.dino_images(made) @ judge.dino_images(given).T
    text = (judge.clip_images(made) * judge.clip_texts(plain)).sum(-1)
    return {
        "overlap": likeness.mean().item(),
        "dino": dino.mean().item(),
        "alignment": text.mean().item(),
        "drift": ((1 - moved.sum(-1)) / 2).mean().item(),
    }


def noise_schedule(scheduler: Any) -> dict[str, Any]:
    """What a sampler's config says about the noise the model was trained with."""
    names = (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
        "prediction_type",
    )  # fmt: skip
    return {name: scheduler.config[name] for name in names}


def run(
    cell: Cell, concept: Picture, make_pipeline: Callable[[], Any], judge: Judge
) -> Iterator[tuple[int, Record]]:
    """Train and measure one trial; the pipeline is made anew, since an adapter is added to it."""
    pipeline, size = make_pipeline(), concept.image.width
    base = generate(pipeline, UNRELATED, cell.seed, size)
    if cell.arm == BASE:
        yield 0, measure(pipeline, concept, cell.seed, judge, base)
        return
    # the sampler's add_noise may have another parametrization (Euler's has): train with DDPM's
    arm, scheduler = ARMS[cell.arm], DDPMScheduler(**noise_schedule(pipeline.scheduler))
    attach(pipeline.unet, arm, r=cell.r, r_min=cell.r_min, targets=TARGETS, seed=cell.seed)
    cast_training_params(pipeline.unet)  # Adam's small steps would vanish in bfloat16
    steps = fit(
        pipeline.unet, scheduler, encode(pipeline, concept.image),
        conditions_of(pipeline, caption(concept), size),
        band=arm.band, lr=cell.lr, checkpoints=cell.steps, batch=1, seed=cell.seed,
    )  # fmt: skip
    for step, loss in steps:
        with acting_in(pipeline.unet, arm.band, scheduler.config["num_train_timesteps"]):
            yield step, {"loss": loss, **measure(pipeline, concept, cell.seed, judge, base)}


def cells(plan: Plan, concepts: Sequence[Picture]) -> list[Cell]:
    """The base and every variant, for each seed and concept."""
    chosen = []
    for seed in range(plan.seeds):
        for concept in concepts:
            chosen.append(Cell(BASE, concept.name, seed))
            chosen += [
                Cell(arm, concept.name, seed, r, r_min, plan.rates[0], plan.steps)
                for arm, r, r_min in variants(plan)
            ]
    return chosen


def benchmark(
    plan: Plan,
    concepts: Sequence[Picture],
    make_pipeline: Callable[[], Any],
    judge: Judge,
    output: Path,
) -> str:
    """Run what is missing and return the tables, one set for each checkpoint."""
    by_name, results = {concept.name: concept for concept in concepts}, output / "results.jsonl"
    wanted = cells(plan, concepts)
    for cell in tqdm(store.missing(wanted, store.load(results)), unit="trial"):
        store.append(results, cell, run(cell, by_name[cell.concept], make_pipeline, judge))
    keys = {cell.key for cell in wanted}
    records = [record for record in store.load(results) if store.key(record) in keys]
    parts = []
    for step in plan.steps:
        chosen = {(BASE, 0, 0): 0} | {variant: step for variant in variants(plan)}
        parts += [f"## {step} steps\n", tables.means_table(records, chosen, NAMES)]
        parts += [tables.intervals_table(records, chosen, NAMES)]
        parts += [tables.paired_table(records, chosen, NAMES)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--concepts", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("evidence-output/sdxl"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--arms", nargs="+", choices=CORE, default=list(CORE))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def make_pipeline() -> Any:
        return StableDiffusionXLPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)

    plan = Plan(
        tuple(args.arms), tuple(args.ranks), rates=(RATE,), seeds=args.seeds, steps=STEPS,
        bands=False,
    )  # fmt: skip
    concepts = load_concepts(args.concepts, args.size)
    text = benchmark(plan, concepts, make_pipeline, Judge.pretrained(device), args.output)
    (args.output / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
