"""Trials: an arm trained on one picture, and judged at its checkpoints."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from evidence import store, tables
from evidence.arms import ARMS, BASE
from evidence.plan import Plan, variants
from evidence.store import Record
from evidence.training import attach, fit
from evidence.trial import Cell
from PIL import Image
from tqdm import tqdm

from real_models.concepts import CONTEXTS, UNRELATED, Picture, caption
from real_models.families import Family
from real_models.judge import Judge

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
NAMES = {
    "overlap": "CLIP image",
    "dino": "DINO image",
    "alignment": "CLIP text",
    "drift": "drift",
}


def generate(
    pipeline: Any, prompts: Sequence[str], seed: int, size: int, sampling: dict[str, Any]
) -> list[Image.Image]:
    """A picture for each prompt; picture i starts from the noise of ``1000 (seed + 1) + i``."""
    pipeline.set_progress_bar_config(disable=True)
    return [
        pipeline(
            text, height=size, width=size, **sampling,
            generator=torch.Generator().manual_seed(1000 * (seed + 1) + i),
        ).images[0]
        for i, text in enumerate(prompts)
    ]  # fmt: skip


def measure(
    asked: list[Image.Image],
    unrelated: list[Image.Image],
    concept: Picture,
    judge: Judge,
    base: list[Image.Image],
) -> Record:
    """The paper's similarities over the contexts, and PEFT's drift from the base's pictures."""
    plain = [f"a photo of a {concept.noun} {context}" for context in CONTEXTS]
    likeness = judge.clip_images(asked) @ judge.clip_images([concept.masked]).T
    dino = judge.dino_images(asked) @ judge.dino_images([concept.masked]).T
    text = (judge.clip_images(asked) * judge.clip_texts(plain)).sum(-1)
    moved = (judge.dino_images(unrelated) * judge.dino_images(base)).sum(-1)
    return {
        "overlap": likeness.mean().item(),
        "dino": dino.mean().item(),
        "alignment": text.mean().item(),
        "drift": ((1 - moved) / 2).mean().item(),
    }


def run(
    cell: Cell,
    concept: Picture,
    family: Family,
    make_pipeline: Callable[[], Any],
    judge: Judge,
) -> Iterator[tuple[int, Record]]:
    """Train and measure one trial; the pipeline is made anew, since an adapter is added to it."""
    pipeline = make_pipeline()
    prompts = [caption(concept, context) for context in CONTEXTS]

    def made(texts: Sequence[str]) -> list[Image.Image]:
        return generate(pipeline, texts, cell.seed, concept.image.width, family.sampling)

    base = made(UNRELATED)
    if cell.arm == BASE:
        yield 0, measure(made(prompts), base, concept, judge, base)
        return
    denoiser = getattr(pipeline, family.denoiser)
    attach(denoiser, ARMS[cell.arm], r=cell.r, r_min=cell.r_min, targets=TARGETS, seed=cell.seed)
    cast_training_params(denoiser)  # Adam's small steps would vanish in bfloat16
    prepared = family.prepare(pipeline, concept.image, caption(concept))
    for step, loss in fit(denoiser, *prepared, lr=cell.lr, checkpoints=cell.steps, seed=cell.seed):
        yield step, {"loss": loss, **measure(made(prompts), made(UNRELATED), concept, judge, base)}


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
    family: Family,
    make_pipeline: Callable[[], Any],
    judge: Judge,
    output: Path,
) -> str:
    """Run what is missing and return the tables, one set for each checkpoint."""
    by_name, results = {concept.name: concept for concept in concepts}, output / "results.jsonl"
    wanted = cells(plan, concepts)
    for cell in tqdm(store.missing(wanted, store.load(results)), unit="trial"):
        measured = run(cell, by_name[cell.concept], family, make_pipeline, judge)
        store.append(results, cell, measured)
    records = tables.records_of(store.load(results), wanted)
    parts = []
    for step in plan.steps:
        chosen = {(BASE, 0, 0): 0} | {variant: step for variant in variants(plan)}
        parts += [f"## {step} steps\n", tables.means_table(records, chosen, NAMES)]
        parts += [tables.intervals_table(records, chosen, NAMES)]
        parts += [tables.paired_table(records, chosen, NAMES)]
    return "\n".join(parts)
