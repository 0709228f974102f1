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
Setting = tuple[float, int]  # learning rate and steps
_TUNING = frozenset(concept.name for concept in SPLITS["tuning"])


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Args:
        arms: Arms in the main comparison.
        ranks: Every r; the first one is tuned, and has the bands.
        shares: Every r_min of the first r, as a share of it; the other r have the first share.
        rates: Learning rates tried for each arm on the tuning concepts.
        tuning, test: How many of the concepts of each split.
        seeds: How many seeds on the test concepts; tuning has one.
        steps: The checkpoints.
        bands: Whether LoRA on bands of timesteps is trained.
    """

    arms: tuple[str, ...] = CORE
    ranks: tuple[int, ...] = (16, 4, 64)
    shares: tuple[float, ...] = (0.5, 0.25)
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    tuning: int = 4
    test: int = 8
    seeds: int = 3
    steps: tuple[int, ...] = (25, 50, 100)
    bands: bool = True


PLANS = {
    "full": Plan(),
    # the arms once on as many concepts as an interval needs, untuned and without the bands
    "quick": Plan(
        ranks=(16,),
        shares=(0.5,),
        rates=(1e-3,),
        tuning=0,
        test=5,
        seeds=1,
        steps=(50, 100),
        bands=False,
    ),
}


def variants(plan: Plan) -> list[Variant]:
    """Every (arm, r, r_min) of a plan; arms without r_min occur once an r, with r_min = 0."""
    chosen = []
    for r in plan.ranks:
        first = r == plan.ranks[0]
        for arm in (*plan.arms, *(BANDS if plan.bands and first else ())):
            shares = plan.shares if first else plan.shares[:1]
            chosen += [(arm, r, int(share * r)) for share in _of(arm, shares)]
    return list(dict.fromkeys(chosen))


def _of(arm: str, shares: tuple[float, ...]) -> tuple[float, ...]:
    return shares if ARMS[arm].reads_minimum else (0.0,)


def tuning_cells(plan: Plan) -> list[Cell]:
    """Every arm at every learning rate on the tuning concepts: the same budget for each.

    They have the plan's first r and r_min; with ``lora_alpha = r`` the rate carries over to others.
    """
    r = plan.ranks[0]
    return [
        Cell(arm, concept.name, 0, r, int(share * r), lr, plan.steps)
        for concept in SPLITS["tuning"][: plan.tuning]
        for lr in plan.rates
        for arm in plan.arms
        for share in _of(arm, plan.shares[:1])
    ]


def setting_of(arm: str, settings: dict[str, Setting], plan: Plan) -> Setting:
    """The chosen rate and step; bands of LoRA take LoRA's, and a plan's only rate needs no choice.

    Raises:
        ValueError: The arm was not tuned yet.
    """
    if len(plan.rates) == 1:
        return plan.rates[0], max(plan.steps)
    tuned = "lora" if arm in BANDS else arm
    if tuned not in settings:
        raise ValueError(
            f"{tuned} has no rate yet; run this plan's tuning trials to their end first"
        )
    return settings[tuned]


def comparison_cells(plan: Plan, records: Sequence[Record]) -> list[Cell]:
    """Every variant at its chosen learning rate on the test concepts; the first r comes first."""
    settings = best_settings(records, plan)
    concepts = [concept.name for concept in SPLITS["test"][: plan.test]]
    pairs = [(concept, seed) for seed in range(plan.seeds) for concept in concepts]
    cells = [Cell(BASE, *pair) for pair in pairs]
    for rank in plan.ranks:
        for pair in pairs:
            for arm, r, r_min in variants(plan):
                if r == rank:
                    lr, _ = setting_of(arm, settings, plan)
                    cells.append(Cell(arm, *pair, r, r_min, lr, plan.steps))
    return cells


def score(record: Record) -> float:
    """What tuning maximises: the harmonic mean of fidelity and alignment."""
    fidelity, alignment = record["overlap"], record["alignment"]
    return 2 * fidelity * alignment / max(fidelity + alignment, 1e-9)


def best_settings(records: Sequence[Record], plan: Plan) -> dict[str, Setting]:
    """The learning rate and the number of steps of each arm that score best in tuning."""
    scores: dict[str, dict[Setting, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["concept"] in _TUNING and record["step"] in plan.steps:
            scores[record["arm"]][record["lr"], record["step"]].append(score(record))
    return {
        arm: max(settings, key=lambda s: float(np.mean(settings[s])))
        for arm, settings in scores.items()
    }
