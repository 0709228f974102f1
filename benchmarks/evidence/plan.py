"""Which trials make up a run, and the learning rate and steps chosen on the tuning concepts."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evidence.arms import ARMS, BANDS, BASE, CORE
from evidence.concepts import SPLITS
from evidence.store import Record
from evidence.trial import Cell

Variant = tuple[str, int, int]
_TUNING = frozenset(concept.name for concept in SPLITS["tuning"])


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Args:
        arms: Arms in the main comparison.
        ranks: Every r.
        shares: Every r_min, as a share of r.
        rates: Learning rates tried for each arm on the tuning concepts.
        tuning, test: How many of the concepts of each split.
        seeds: How many seeds on the test concepts; tuning has one.
        steps: The checkpoints.
        bands: Whether LoRA on bands of timesteps is trained, at the first r.
    """

    arms: tuple[str, ...] = CORE
    ranks: tuple[int, ...] = (16, 4, 64)
    shares: tuple[float, ...] = (0.5, 0.25)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    tuning: int = 4
    test: int = 8
    seeds: int = 3
    steps: tuple[int, ...] = (50, 100, 200, 400)
    bands: bool = True


PLANS = {
    "full": Plan(),
    # all arms and bands once on every test concept, untuned: a quarter of an hour on two cores
    "subset": Plan(ranks=(16,), shares=(0.5,), rates=(3e-3,), tuning=0, seeds=1, steps=(40, 100)),
    # the arms once on as many concepts as an interval needs, untuned and without the bands
    "quick": Plan(
        ranks=(16,),
        shares=(0.5,),
        rates=(3e-3,),
        tuning=0,
        test=5,
        seeds=1,
        steps=(40, 100),
        bands=False,
    ),
}


def variants(plan: Plan) -> list[Variant]:
    """Every (arm, r, r_min) of a plan; arms without r_min occur once an r, with r_min = 0."""
    chosen = []
    for r in plan.ranks:
        for arm in (*plan.arms, *(BANDS if plan.bands and r == plan.ranks[0] else ())):
            shares = plan.shares if ARMS[arm].reads_minimum else (0.0,)
            chosen += [(arm, r, int(share * r)) for share in shares]
    return list(dict.fromkeys(chosen))


def tuning_cells(plan: Plan) -> list[Cell]:
    """Every variant at every learning rate on the tuning concepts: the same budget for each."""
    return [
        Cell(arm, concept.name, 0, r, r_min, lr, plan.steps)
        for concept in SPLITS["tuning"][: plan.tuning]
        for lr in plan.rates
        for arm, r, r_min in variants(plan)
        if arm not in BANDS
    ]


def rate_of(variant: Variant, settings: dict[Variant, tuple[float, int]], plan: Plan) -> float:
    """The chosen rate; bands of LoRA take LoRA's, and a plan's only rate needs no choice.

    Raises:
        ValueError: The variant was not tuned yet.
    """
    if len(plan.rates) == 1:
        return plan.rates[0]
    arm, r, r_min = variant
    tuned = ("lora" if arm in BANDS else arm, r, r_min)
    if tuned not in settings:
        raise ValueError(
            f"{tuned} has no rate yet; run this plan's tuning trials to their end first"
        )
    return settings[tuned][0]


def comparison_cells(plan: Plan, records: Sequence[Record]) -> list[Cell]:
    """Every variant at its chosen learning rate on the test concepts, seed by seed."""
    settings, cells = best_settings(records, plan), []
    for seed in range(plan.seeds):
        for concept in SPLITS["test"][: plan.test]:
            cells.append(Cell(BASE, concept.name, seed))
            for variant in variants(plan):
                lr = rate_of(variant, settings, plan)
                cells.append(Cell(variant[0], concept.name, seed, *variant[1:], lr, plan.steps))
    return cells


def score(record: Record) -> float:
    """What tuning maximises: the harmonic mean of fidelity and alignment."""
    fidelity, alignment = record["overlap"], record["alignment"]
    return 2 * fidelity * alignment / max(fidelity + alignment, 1e-9)


def best_settings(records: Sequence[Record], plan: Plan) -> dict[Variant, tuple[float, int]]:
    """The learning rate and the number of steps of each variant that score best in tuning."""
    scores: dict[Variant, dict[tuple[float, int], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in records:
        if record["concept"] in _TUNING and record["step"] in plan.steps:
            variant = (record["arm"], record["r"], record["r_min"])
            scores[variant][record["lr"], record["step"]].append(score(record))
    return {
        variant: max(settings, key=lambda s: float(np.mean(settings[s])))
        for variant, settings in scores.items()
    }
