"""The tables of a report, as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from evidence import analysis, limits
from evidence.arms import BANDS, BASE, title
from evidence.plan import (
    Plan,
    Variant,
    at_rank,
    best_settings,
    comparison_cells,
    equal_rate_cells,
    score,
    setting_of,
    tuning_cells,
    variants,
)
from evidence.store import Record, key
from evidence.trial import Cell

METRICS = {
    "overlap": "fidelity",
    "elsewhere_overlap": "fidelity elsewhere",
    "identity": "identity",
    "rmse": "RMSE",
    "toy_embedding": "toy embedding",
    "alignment": "alignment",
    "right_background": "background",
    "right_texture": "texture",
    "right_position": "position",
    "elsewhere_leakage": "leakage",
    "free_leakage": "leakage, bare prompt",
    "diversity": "diversity",
    "similarity": "similarity",
    "drift": "drift",
}
FEW_PICTURES = 48  # fewer don't determine the Gaussian that the toy FID fits (24 features)
Names = Mapping[Any, str]  # by an analysis.Metric; a mapping of names alone must fit, too
PAIRED: Names = {
    **{name: METRICS[name] for name in ("overlap", "elsewhere_overlap", "alignment")},
    score: "score",
    **{name: METRICS[name] for name in ("elsewhere_leakage", "drift")},
}
BAND_NAMES = {name: METRICS[name] for name in ("overlap", "alignment", "drift", "free_leakage")}


def name_of(variant: Variant) -> str:
    arm, r, r_min = variant
    ranks = f", r={r}" + (f", r_min={r_min}" if r_min else "") if r else ""
    return title(arm) + ranks


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tested(records: Sequence[Record], plan: Plan) -> list[Record]:
    """The records of the plan's test trials, each arm at its chosen rate."""
    return records_of(records, comparison_cells(plan, records))


def records_of(records: Sequence[Record], cells: Iterable[Cell]) -> list[Record]:
    """The records of the cells' trials."""
    keys = {cell.key for cell in cells}
    return [record for record in records if key(record) in keys]


def limits_table() -> str:
    kinds = limits.measure_limits()
    rows = [
        [label, *(f"{np.mean([r[metric] for r in records]):.3f}" for records in kinds.values())]
        for metric, label in METRICS.items()
    ]
    return markdown(["measure", *kinds], rows)


def means_table(
    records: Sequence[Record], steps: dict[Variant, int], names: Names = METRICS
) -> str:
    """Every measure of each variant at its number of steps."""
    has_features = any("features" in record for record in records)
    rows = []
    for variant, step in steps.items():
        chosen = analysis.select(records, variant, step)
        if not chosen:
            continue
        cells = [f"{analysis.mean(analysis.table(chosen, m)):.3f}" for m in names]
        toy = _toy_scores(chosen) if has_features else []
        rows.append([name_of(variant), str(step), *cells, *toy])
    header = ["arm", "steps", *names.values(), *(("toy FID", "toy IS") if has_features else ())]
    return markdown(header, rows)


def _toy_scores(records: Sequence[Record]) -> list[str]:
    truth = {r["concept"]: r["features"] for r in limits.measure_limits()["true pictures"]}
    made = np.array([f for r in records for f in r["features"]])
    if len(made) < FEW_PICTURES:
        return ["-", "-"]
    true = np.array([f for r in records for f in truth[r["concept"]]])
    return [f"{analysis.toy_frechet(made, true):.2f}", f"{analysis.toy_inception(made):.2f}"]


def intervals_table(
    records: Sequence[Record], steps: dict[Variant, int], names: Names = PAIRED
) -> str:
    """The main measures with intervals."""
    rows = []
    for variant, step in steps.items():
        chosen = analysis.select(records, variant, step)
        if chosen:
            rows.append([
                name_of(variant),
                *(str(analysis.bootstrap(analysis.table(chosen, m))) for m in names),
            ])  # fmt: skip
    return markdown(["arm", *names.values()], rows)


def paired_table(
    records: Sequence[Record], steps: dict[Variant, int], names: Names = PAIRED
) -> str:
    """T-LoRA minus every other arm of its rank, on the same concepts and seeds."""
    rows = []
    for target in (v for v in steps if v[0] == "tlora"):
        ours = analysis.select(records, target, steps[target])
        for other, step in steps.items():
            theirs = analysis.select(records, other, step)
            if not _comparable(other, target) or not ours or not theirs:
                continue
            differences = [str(analysis.paired(ours, theirs, metric)) for metric in names]
            rows.append([f"{name_of(target)} - {name_of(other)}", *differences])
    return markdown(["difference", *names.values()], rows)


def matched_table(records: Sequence[Record], plan: Plan, chosen: Sequence[Variant]) -> str:
    """T-LoRA's alignment minus the others' at the fidelity that T-LoRA has at a checkpoint.

    The others' is read off the line from the base through their checkpoints.
    """
    base, steps = analysis.select(records, (BASE, 0, 0), 0), sorted(plan.steps)
    curves = {v: [base, *(analysis.select(records, v, step) for step in steps)] for v in chosen}
    curves = {variant: curve for variant, curve in curves.items() if all(curve)}
    rows = []
    for target in (v for v in curves if v[0] == "tlora"):
        for other in (v for v in curves if _comparable(v, target)):
            found = [analysis.matched(ours, curves[other]) for ours in curves[target][1:]]
            differences = (str(interval or "-") for interval in found)
            rows.append([f"{name_of(target)} - {name_of(other)}", *differences])
    return markdown(["alignment", *(f"at T-LoRA's of {step} steps" for step in steps)], rows)


def _comparable(other: Variant, target: Variant) -> bool:
    """Whether T-LoRA's variant ``target`` is compared with another of its rank."""
    return other != target and other[1] == target[1] and other[2] in (0, target[2])


def tuning_table(records: Sequence[Record], plan: Plan) -> str:
    """Every arm at every rate on the tuning concepts, at the last checkpoint."""
    names = {"overlap": "fidelity", "alignment": "alignment", score: "score", "drift": "drift"}
    tuned, rows = records_of(records, tuning_cells(plan)), []
    for arm in plan.arms:
        for lr in plan.rates:
            found = [
                r for r in tuned if (r["arm"], r["lr"], r["step"]) == (arm, lr, max(plan.steps))
            ]
            if found:
                means = [analysis.mean(analysis.table(found, metric)) for metric in names]
                rows.append([title(arm), f"{lr:g}", *(f"{mean:.3f}" for mean in means)])
    return markdown(["arm", "rate", *names.values()], rows)


def equal_rates(records: Sequence[Record], plan: Plan) -> list[str]:
    """The main comparison at one rate, if tuning has chosen several."""
    cells = equal_rate_cells(plan, records)
    if {cell.key for cell in cells} <= {cell.key for cell in comparison_cells(plan, records)}:
        return []
    chosen, main = records_of(records, cells), at_rank(plan, plan.ranks[0])
    (rate,) = {cell.lr for cell in cells if cell.arm != BASE}
    parts = [f"## Equal rates ({rate:g})\n", matched_table(chosen, plan, main)]
    for step in sorted(plan.steps, reverse=True):
        at = dict.fromkeys(main, step)
        parts += [f"### After {step} steps\n", intervals_table(chosen, at)]
        parts += [paired_table(chosen, at)]
    return parts


def report(records: Sequence[Record], plan: Plan) -> str:
    """All tables of a plan."""
    final = max(plan.steps)
    test = tested(records, plan)
    equal = {(BASE, 0, 0): 0} | {v: final for v in variants(plan)}
    planned = len(comparison_cells(plan, records))
    concepts, seeds = {r["concept"] for r in test}, {r["seed"] for r in test}
    parts = [
        f"{len(concepts)} test concepts, {len(seeds)} seeds, "
        f"{len({key(r) for r in test})} of {planned} trials, checkpoints {plan.steps}.\n",
        "## What the measures can say\n", limits_table(),
        f"## Equal steps ({final})\n", means_table(test, equal), intervals_table(test, equal),
        "### T-LoRA against the others, paired\n", paired_table(test, equal),
    ]  # fmt: skip
    for step in sorted(plan.steps)[:-1]:
        earlier = {v: step for v in equal if v[0] not in BANDS}
        parts += [f"### The same after {step} steps\n", paired_table(test, earlier)]
    arms = [v for v in equal if v[0] not in (BASE, *BANDS)]
    parts += ["## Equal fidelity\n", matched_table(test, plan, arms)]
    settings = best_settings(records, plan) if plan.tuning else {}
    if settings:
        best = {(BASE, 0, 0): 0} | {v: setting_of(v[0], settings, plan)[1] for v in variants(plan)}
        chosen = [[title(arm), f"{lr:g}", str(step)] for arm, (lr, step) in settings.items()]
        parts += [
            f"## The tuning concepts after {final} steps\n", tuning_table(records, plan),
            "### Chosen on them\n", markdown(["arm", "rate", "best step"], chosen),
            "## Each arm at its best step\n", means_table(test, best), intervals_table(test, best),
            "### T-LoRA against the others, paired\n", paired_table(test, best),
        ]  # fmt: skip
    parts += equal_rates(records, plan)
    if any(v[0] in BANDS for v in equal):
        bands = {v: s for v, s in equal.items() if v[0] in (*BANDS, "lora", BASE)}
        parts += ["## Where overfitting comes from\n", intervals_table(test, bands, BAND_NAMES)]
    return "\n".join(parts)
