"""What concepts lose when two adapters act together: of equal starts, and of starts of their own.

    PYTHONPATH=examples:benchmarks:. python benchmarks/combined.py

The evidence's test concepts are trained on the embedded base, each from two starts: T-LoRA's start
is made of its `init_seed`, LoRA's is its A. Neighbours among the concepts, as in a ring, then act
together with weight 1 each, in all four pairings of their starts: two pairings have equal starts,
two have not, so both arms consist of the same adapters and differ in nothing but who meets whom.
A concept's training noise and the pictures' noise are the same in all arms.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from evidence.analysis import bootstrap, paired, table
from evidence.concepts import TEST, Concept, asked_settings, prompt, training_setting
from evidence.metrics import match, measure
from evidence.store import Record
from evidence.training import fit
from evidence.trial import ASKED, BATCH, SAMPLING, TARGETS, fresh_pipeline, prepare
from measure import report
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch.nn.functional import cosine_similarity
from toybox.check import palette_map
from toybox.gate import generate

from peft_tlora import TLoraConfig

STARTS = (0, 1)
R, MIN_RANK, RATE, STEPS = 16, 8, 2e-3, 50
OPTIONS = {"r": R, "lora_alpha": R, "target_modules": TARGETS}
METHODS: dict[str, Callable[[int], LoraConfig]] = {
    "T-LoRA": lambda start: TLoraConfig(min_rank=MIN_RANK, init_seed=start, **OPTIONS),
    "LoRA": lambda start: LoraConfig(**OPTIONS),
}
START_NAMES = {"T-LoRA": "init_seed", "LoRA": "A"}
NAMES = ("sks", "vzw")  # of every other concept, so that the two of a pair differ
MEASURES = {
    "overlap": "fidelity",
    "alignment": "alignment",
    "leakage": "leakage",
    "other": "fidelity of the other concept",
}
NOTES = f"""
{len(TEST)} pairs of concepts, r={R}, r_min={MIN_RANK}, {STEPS} steps at rate {RATE:g}; {ASKED}
pictures of each concept and case, leakage in those of another place than the training picture's.
The cosine is that of the two updates of a layer at full rank, mean over the layers. In brackets:
95 % bootstrap intervals; concepts are the unit. The base without an adapter has a fidelity of about
0.17 (evidence-full.md): two adapters together are close to that, so little is left to differ in.

The concepts of a pair are called "sks toy" and "vzw toy", but the base's text encoder hardly tells
such names apart (cosine of the states: 0.998), so each adapter acts on the other's prompts, too.
The base's layers have 96 to 3456 inputs, of which r={R} is a larger part than in real models: even
different starts share a tenth of their subspaces (of the inputs, mean over the layers).
""".strip()


@dataclass(frozen=True)
class Trained:
    """An adapter's file, and what it makes of its own prompts alone."""

    folder: Path
    pictures: list[Image.Image]


def named(text: str, number: int) -> str:
    """A prompt with the name of a concept, by its number in `TEST`."""
    return text.replace(NAMES[0], NAMES[number % len(NAMES)])


def pictures_of(pipeline: Any, number: int) -> list[Image.Image]:
    prompts = [named(prompt(s), number) for s in asked_settings(TEST[number], ASKED)]
    return generate(pipeline, prompts, seed=1000, **SAMPLING)


def train(method: str, number: int, start: int, folder: Path) -> Trained:
    pipeline = fresh_pipeline("cpu")
    unet = pipeline.unet
    clean, conditions, noising = prepare(pipeline, TEST[number], BATCH)
    states = pipeline.encode_prompt(named(prompt(), number), "cpu", 1, False)[0]
    conditions["encoder_hidden_states"] = states.expand(BATCH, -1, -1)
    torch.manual_seed(start)  # LoRA's A
    unet.add_adapter(METHODS[method](start))
    options = {"lr": RATE, "checkpoints": (STEPS,), "seed": number}
    list(fit(unet, clean, conditions, noising, **options))
    unet.save_lora_adapter(folder)
    return Trained(folder, pictures_of(pipeline, number))


@torch.no_grad()
def cosine(unet: Any, names: list[str]) -> float:
    """Mean over the layers of the cosine between the updates of two adapters at full rank."""
    layers: list[Any] = [layer for layer in unet.modules() if isinstance(layer, LoraLayer)]
    cosines = [
        cosine_similarity(*(layer.get_delta_weight(name).flatten() for name in names), dim=0)
        for layer in layers
    ]
    return float(torch.stack(cosines).mean())


def judged(pictures: list[Image.Image], concept: Concept, other: Concept) -> dict[str, float]:
    """The measures of pictures that should show a concept, with how far they show the other."""
    settings, seen = asked_settings(concept, ASKED), training_setting(concept)
    rows = [
        {**measure(p, concept, s, seen), "other": match(palette_map(p), other).overlap}
        for p, s in zip(pictures, settings, strict=True)
    ]
    moved = [r for r, s in zip(rows, settings, strict=True) if s.position != seen.position]
    leakage = mean(row["leakage"] for row in moved)  # elsewhere, the place is as asked
    return {**{name: mean(row[name] for row in rows) for name in MEASURES}, "leakage": leakage}


def measured(method: str, folder: Path) -> dict[str, list[Record]]:
    """Records of a method's adapters alone, of equal starts and of different ones.

    The records' "seed" tells which partner and start of its own an asked concept has.
    """
    trained = {
        (number, start): train(method, number, start, folder / f"{number}.{start}")
        for number, start in product(range(len(TEST)), STARTS)
    }
    records: dict[str, list[Record]] = {"alone": [], "equal": [], "own": []}
    for number in range(len(TEST)):
        pair = (number, (number + 1) % len(TEST))
        pipeline = fresh_pipeline("cpu")
        for one, start in product(pair, STARTS):
            options = {"prefix": None, "use_safetensors": True, "adapter_name": f"{one}_{start}"}
            pipeline.unet.load_lora_adapter(trained[one, start].folder, **options)
        for starts in product(STARTS, repeat=2):
            kind = "equal" if starts[0] == starts[1] else "own"
            names = [f"{one}_{start}" for one, start in zip(pair, starts, strict=True)]
            pipeline.unet.set_adapters(names)
            common = cosine(pipeline.unet, names)
            for place, (asked, start) in enumerate(zip(pair, starts, strict=True)):
                concept, other = TEST[asked], TEST[pair[1 - place]]
                about = {"concept": concept.name, "seed": len(STARTS) * place + start}
                made = judged(pictures_of(pipeline, asked), concept, other)
                records[kind].append({**about, "updates": common, **made})
                if kind == "equal":
                    alone = judged(trained[asked, start].pictures, concept, other)
                    records["alone"].append({**about, **alone})
    return records


def rows_of(method: str, records: dict[str, list[Record]]) -> list[list[object]]:
    alone, equal, own = (records[kind] for kind in ("alone", "equal", "own"))
    start = START_NAMES[method]
    rows: list[list[object]] = [
        [f"{method} alone", "", *(bootstrap(table(alone, name)) for name in MEASURES)]
    ]
    for title, together in ((f"equal {start}", equal), (f"{start} of its own", own)):
        lost = [paired(together, alone, name) for name in MEASURES]
        title = f"{method}, {title}: together - alone"
        rows.append([title, bootstrap(table(together, "updates")), *lost])
    gained = [paired(own, equal, name) for name in ("updates", *MEASURES)]
    return [*rows, [f"{method}: its own - equal", *gained]]


def main() -> None:
    rows = []
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(method, measured(method, Path(folder)))
    head = ["adapters", "cosine of the updates", *MEASURES.values()]
    report("combined", "Two concepts' adapters active together", head, rows, NOTES)


if __name__ == "__main__":
    main()
