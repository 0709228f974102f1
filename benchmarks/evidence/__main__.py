"""Run the benchmark, or analyse what has run.

    PYTHONPATH=examples:benchmarks python -m evidence run --plan quick --output evidence-output
    PYTHONPATH=examples:benchmarks python -m evidence report --output evidence-output

A run that is stopped goes on where it was. A GPU is used if there is one.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from toybox.gate import contact_sheet
from tqdm import tqdm

from evidence import plan as plans
from evidence import store
from evidence.report import write_report
from evidence.trial import Cell, run

RESULTS = "results.jsonl"


def _save_pictures(folder: Path, cell: Cell, step: int, pictures: list[Image.Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{cell.concept}.{cell.seed}.{cell.arm}.r{cell.r}.min{cell.r_min}.{step}.png"
    contact_sheet(pictures, columns=len(pictures), scale=1).save(folder / name)


def run_cells(cells: Iterable[Cell], output: Path, device: str, label: str) -> None:
    """Run the cells that are not in the results yet."""
    results = output / RESULTS
    for cell in tqdm(store.missing(cells, store.load(results)), desc=label, unit="trial"):
        measured = []
        for step, values, pictures in run(cell, device):
            measured.append((step, values))
            _save_pictures(output / "pictures", cell, step, pictures["asked"] + pictures["free"])
        store.append(results, cell, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--plan", choices=tuple(plans.PLANS), default="quick")
    parser.add_argument("--output", type=Path, default=Path("evidence-output"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    plan = plans.PLANS[args.plan]
    if args.action == "run":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        if len(plan.rates) > 1:
            run_cells(plans.tuning_cells(plan), args.output, args.device, "tuning")
        cells = plans.comparison_cells(plan, store.load(args.output / RESULTS))
        run_cells(cells, args.output, args.device, "test")
    write_report(store.load(args.output / RESULTS), plan, args.output)


if __name__ == "__main__":
    main()
