"""Running cells, some at a time, and writing down what they measured.

It is no part of ``__main__``, which processes of a pool can't import.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from toybox.gate import contact_sheet
from tqdm import tqdm

from evidence import store
from evidence.trial import Cell, run

T = TypeVar("T")
R = TypeVar("R")
RESULTS = "results.jsonl"
Result = tuple[Cell, list[tuple[int, store.Record]]]


def _save_pictures(folder: Path, cell: Cell, step: int, pictures: list[Image.Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(pictures, columns=len(pictures), scale=1)
    sheet.save(folder / cell.picture_name(step))


def run_cell(cell: Cell, folder: Path, device: str) -> Result:
    """Run one cell and save its pictures; returns the measures of its checkpoints."""
    measured = []
    for step, values, pictures in run(cell, device):
        measured.append((step, values))
        _save_pictures(folder, cell, step, pictures["asked"] + pictures["free"])
    return cell, measured


def spread(cells: list[T], work: Callable[[T], R], workers: int) -> Iterator[R]:
    """What ``work`` returns for the cells, as it comes; several workers have a thread each."""
    if workers == 1:
        yield from map(work, cells)
        return
    with get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(work, cells)


def run_cells(
    cells: Iterable[Cell], output: Path, device: str, label: str, workers: int = 1
) -> None:
    """Run the cells that are not in the results yet, ``workers`` at a time."""
    missing = store.missing(cells, store.load(output / RESULTS))
    work = partial(run_cell, folder=output / "pictures", device=device)
    results = spread(missing, work, workers)
    for cell, measured in tqdm(results, desc=label, unit="trial", total=len(missing)):
        store.append(output / RESULTS, cell, measured)
