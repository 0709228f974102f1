"""Which trials make up a run, and the learning rate and steps chosen on the tuning concepts."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
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
        bands: Whether LoRA is run in bands of timesteps.
    """

    arms: tuple[str, ...] = CORE
    ranks: tuple[int, ...] = (16, 4, 64)
    shares: tuple[float, ...] = (0.5, 0.25)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    tuning: int = 4
    test: int = 8
    seeds: int = 3
    steps: tuple[int, ...] = (25, 50, 100)
    bands: bool = True


PLANS = {
    "full": Plan(),
    # part of the full run's equal rates: on as many concepts as an interval needs, with one seed
    "quick": Plan(
        ranks=(16,),
        shares=(0.5,),
        rates=(2e-3,),
        tuning=0,
        test=5,
        seeds=1,
        steps=(50, 100),
        bands=False,
    ),
}


def variants(plan: Plan) -> list[Variant]:
    """Every (arm, r, r_min) of a plan; arms without r_min occur once an r, with r_min = 0."""
    return [variant for stage in stages(plan) for variant in stage]


def stages(plan: Plan) -> list[list[Variant]]:
    """The variants in the order in which they run: the main comparison before what varies it."""
    (first, *others), (share, *shares) = plan.ranks, plan.shares
    reading = [arm for arm in plan.arms if ARMS[arm].reads_minimum]
    return [
        at_rank(plan, first),
        *(_at(first, other, reading) for other in shares),
        *(at_rank(plan, r) for r in others),
        _at(first, share, BANDS if plan.bands else ()),
    ]


def at_rank(plan: Plan, r: int) -> list[Variant]:
    """Every arm of the comparison at one r, with the first share as r_min."""
    return _at(r, plan.shares[0], plan.arms)


def _at(r: int, share: float, arms: Iterable[str]) -> list[Variant]:
    return [(arm, r, int(share * r) if ARMS[arm].reads_minimum else 0) for arm in arms]


def tuning_cells(plan: Plan) -> list[Cell]:
    """Every arm at every learning rate on the tuning concepts: the same budget for each.

    They have the plan's first r and r_min; with ``lora_alpha = r`` the rate carries over to others.
    """
    return [
        Cell(arm, concept.name, 0, r, r_min, lr, plan.steps)
        for concept in SPLITS["tuning"][: plan.tuning]
        for lr in plan.rates
        for arm, r, r_min in at_rank(plan, plan.ranks[0])
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
    """Every variant at its chosen learning rate on the test concepts, stage by stage."""
    settings = best_settings(records, plan)
    cells = _base_cells(plan)
    for stage in stages(plan):
        rates = {arm: setting_of(arm, settings, plan)[0] for arm, _, _ in stage}
        cells += _cells(plan, stage, rates)
    return cells


def equal_rate_cells(plan: Plan, records: Sequence[Record]) -> list[Cell]:
    """The main comparison with every arm at T-LoRA's rate: a rate alone moves all measures."""
    if "tlora" not in plan.arms:
        return []
    rate, _ = setting_of("tlora", best_settings(records, plan), plan)
    return _base_cells(plan) + _cells(
        plan, at_rank(plan, plan.ranks[0]), dict.fromkeys(plan.arms, rate)
    )


def _pairs(plan: Plan) -> list[tuple[str, int]]:
    concepts = [concept.name for concept in SPLITS["test"][: plan.test]]
    return [(concept, seed) for seed in range(plan.seeds) for concept in concepts]


def _base_cells(plan: Plan) -> list[Cell]:
    return [Cell(BASE, *pair) for pair in _pairs(plan)]


def _cells(plan: Plan, stage: Iterable[Variant], rates: dict[str, float]) -> list[Cell]:
    return [
        Cell(arm, *pair, r, r_min, rates[arm], plan.steps)
        for pair in _pairs(plan)
        for arm, r, r_min in stage
    ]


def score(record: Record) -> float:
    """What tuning maximises: the harmonic mean of fidelity and alignment."""
    fidelity, alignment = record["overlap"], record["alignment"]
    return 2 * fidelity * alignment / max(fidelity + alignment, 1e-9)


def best_settings(records: Sequence[Record], plan: Plan) -> dict[str, Setting]:
    """The learning rate and the number of steps of each arm that score best in tuning."""
    scores: dict[str, dict[Setting, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        planned = record["lr"] in plan.rates and record["step"] in plan.steps
        if planned and record["concept"] in _TUNING:
            scores[record["arm"]][record["lr"], record["step"]].append(score(record))
    return {
        arm: max(settings, key=lambda s: float(np.mean(settings[s])))
        for arm, settings in scores.items()
    }
