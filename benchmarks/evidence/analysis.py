"""Means, paired differences and Pareto fronts, with bootstrap intervals over concepts and seeds."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.linalg import sqrtm

from evidence.plan import Variant
from evidence.store import Record

DRAWS = 2000
ENOUGH = 5  # concepts; resampling fewer gives intervals far too narrow, so none is shown
Table = dict[str, dict[int, float]]  # concept -> seed -> value
Metric = str | Callable[[Record], float]  # a name in the records, or made of several


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval, and how many concepts it rests on."""

    mean: float
    low: float
    high: float
    concepts: int

    def __str__(self) -> str:
        if self.concepts < ENOUGH:
            return f"{self.mean:.3f} (n={self.concepts})"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def variant_of(record: Record) -> Variant:
    """The arm and its ranks."""
    return (record["arm"], record["r"], record["r_min"])


def select(records: Sequence[Record], variant: Variant, step: int) -> list[Record]:
    """The records of a variant at a checkpoint; the base has only the checkpoint 0."""
    wanted = 0 if variant[0] == "base" else step
    return [r for r in records if variant_of(r) == variant and r["step"] == wanted]


def table(records: Sequence[Record], metric: Metric) -> Table:
    """A metric by concept and seed."""
    values: Table = defaultdict(dict)
    for record in records:
        value = metric(record) if callable(metric) else record[metric]
        values[record["concept"]][record["seed"]] = value
    return dict(values)


def matrix(values: Table) -> np.ndarray:
    """The table as ``(concepts, seeds)``, nan where a concept has fewer seeds than others."""
    width = max(len(seeds) for seeds in values.values())
    cells = np.full((len(values), width), np.nan)
    for row, seeds in zip(cells, values.values(), strict=True):
        row[: len(seeds)] = list(seeds.values())
    return cells


def resample(cells: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of concepts drawn with replacement, and for each of as many of its seeds.

    Args:
        cells: What ``matrix`` returns.
        draws: The number of resamples.
        seed: Decides them.

    Returns:
        Indices that select ``(draws, concepts, seeds)`` values.
    """
    rng = np.random.default_rng(seed)
    concepts, seeds = cells.shape
    chosen = rng.integers(concepts, size=(draws, concepts))
    available = np.isfinite(cells).sum(1)[chosen]
    within = rng.random((draws, concepts, seeds)) * available[..., None]
    return chosen[..., None], within.astype(int)


def mean(values: Table) -> float:
    """The mean over concepts of each one's mean over seeds."""
    return float(np.mean([np.mean(list(seeds.values())) for seeds in values.values()]))


def bootstrap(values: Table, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean with its interval; concepts are the unit, since seeds of one are alike.

    Raises:
        ValueError: There is nothing to resample.
    """
    if not values:
        raise ValueError("no records of this kind; run the trials first")
    cells = matrix(values)
    drawn = cells[resample(cells, draws, seed)].mean((1, 2))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(mean(values), float(low), float(high), len(values))


def paired(first: Sequence[Record], second: Sequence[Record], metric: Metric) -> Interval:
    """``first - second`` on the concepts and seeds that both have."""
    a, b = table(first, metric), table(second, metric)
    common = {
        concept: {s: a[concept][s] - b[concept][s] for s in seeds if s in b.get(concept, {})}
        for concept, seeds in a.items()
    }
    return bootstrap({concept: seeds for concept, seeds in common.items() if seeds})


def front(points: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The best alignment among ``(points, 2)`` of at least each fidelity; nan where none is."""
    fidelity, alignment = points.T
    reached = fidelity >= grid[:, None]
    best = np.where(reached, alignment, -np.inf).max(1, initial=-np.inf)
    return np.where(np.isfinite(best), best, np.nan)


def front_band(
    checkpoints: Sequence[Sequence[Record]], grid: np.ndarray, draws: int = 500, seed: int = 0
) -> np.ndarray:
    """A variant's front over its checkpoints: mean, low and high, ``(3, len(grid))``.

    A level that fewer than half the resamples reach is left out.
    """
    centre, drawn = _points([part for part in checkpoints if part], draws, seed)
    curves = np.array([front(points, grid) for points in drawn])
    reached = np.isfinite(curves).mean(0) >= 0.5
    band = np.full((3, len(grid)), np.nan)
    band[0] = front(centre, grid)
    band[1:, reached] = np.nanquantile(curves[:, reached], (0.025, 0.975), axis=0)
    return band


def _points(
    checkpoints: Sequence[Sequence[Record]], draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(Fidelity, alignment) of each checkpoint, ``(points, 2)``, and of resamples of all."""
    tables = [[table(records, m) for m in ("overlap", "alignment")] for records in checkpoints]
    indices = resample(matrix(tables[0][0]), draws, seed)
    means = np.array([[matrix(t)[indices].mean((1, 2)) for t in pair] for pair in tables])
    return np.array([[mean(t) for t in pair] for pair in tables]), means.transpose(2, 0, 1)


def on_curve(points: np.ndarray, level: float) -> float:
    """The best alignment at which the line through ``(points, 2)`` passes a fidelity, or nan."""
    best = np.nan
    for (fidelity, alignment), (after, alignment_after) in pairwise(points):
        if min(fidelity, after) <= level <= max(fidelity, after) and after != fidelity:
            share = (level - fidelity) / (after - fidelity)
            best = np.fmax(best, alignment + share * (alignment_after - alignment))
    return float(best)


def matched(
    ours: Sequence[Record],
    theirs: Sequence[Sequence[Record]],
    draws: int = 500,
    seed: int = 0,
) -> Interval | None:
    """Our alignment at a checkpoint, minus theirs where their curve passes our fidelity.

    Args:
        ours: The records of one checkpoint.
        theirs: The records of each checkpoint of the other, in order.
        draws: The number of resamples; both get the same concepts and seeds.
        seed: Decides them.

    Returns:
        None where they don't reach our fidelity, or not in a tenth of the resamples.
    """
    parts = [ours, *theirs]
    common = set.intersection(*({(r["concept"], r["seed"]) for r in part} for part in parts))
    if not common:
        return None
    kept = [[r for r in part if (r["concept"], r["seed"]) in common] for part in parts]
    centre, resampled = _points(kept, draws, seed)
    value, *drawn = (
        points[0, 1] - on_curve(points[1:], points[0, 0]) for points in (centre, *resampled)
    )
    if np.isnan(value) or np.isnan(drawn).mean() > 0.1:
        return None
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return Interval(float(value), float(low), float(high), len({concept for concept, _ in common}))


def toy_frechet(features: np.ndarray, truth: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to two sets of features (FID's formula)."""
    root = sqrtm(np.cov(features.T) @ np.cov(truth.T))
    distance = ((features.mean(0) - truth.mean(0)) ** 2).sum()
    trace = np.trace(np.cov(features.T) + np.cov(truth.T) - 2 * np.real(root))
    return float(distance + trace)


@torch.no_grad()
def toy_inception(features: np.ndarray) -> float:
    """Inception Score's formula with the project's encoder, on its background head."""
    from evidence.encoder import load

    scores = load().logits(torch.from_numpy(features.astype(np.float32)))["background"]
    chances = scores.softmax(-1)
    spread = (chances * (chances.log() - chances.mean(0).log())).sum(-1).mean()
    return float(spread.exp())
