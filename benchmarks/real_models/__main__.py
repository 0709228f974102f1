"""The paper's protocol on SDXL or FLUX: the same arms and tables, CLIP and DINO for similarities.

    PYTHONPATH=examples:benchmarks python -m real_models FAMILY --concepts FOLDER --output DIR

``--concepts`` holds a folder for each concept with ``image.png``, ``class.txt`` (the class's name,
"toy") and, if the background is to be masked, ``mask.png`` (white on the object). Trials that are
in the results are skipped. In bfloat16 the weights alone take 7 GB for SDXL, 34 GB for FLUX.1-dev.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from evidence.arms import CORE
from evidence.plan import Plan

from real_models.concepts import load_concepts
from real_models.families import FAMILIES
from real_models.judge import Judge
from real_models.protocol import benchmark

RATE = 1e-4  # AdamW's for every arm: the paper's for SDXL (for FLUX it has Prodigy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=tuple(FAMILIES))
    parser.add_argument("--model", help="another checkpoint of the family")
    parser.add_argument("--concepts", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="evidence-output/FAMILY by default")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--arms", nargs="+", choices=CORE, default=list(CORE))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024)
    args = parser.parse_args()
    family = FAMILIES[args.family]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def make_pipeline() -> Any:
        model = args.model or family.model
        return family.pipeline.from_pretrained(model, torch_dtype=dtype).to(device)

    plan = Plan(
        tuple(args.arms), tuple(args.ranks), rates=(RATE,), seeds=args.seeds, steps=family.steps,
        bands=False,
    )  # fmt: skip
    output = args.output or Path("evidence-output") / args.family
    concepts = load_concepts(args.concepts, args.size)
    text = benchmark(plan, concepts, family, make_pipeline, Judge.pretrained(device), output)
    (output / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
