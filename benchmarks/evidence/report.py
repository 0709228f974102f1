"""The report of a run: tables to read, plots and picture grids to look at."""

from collections.abc import Sequence
from pathlib import Path

from evidence import plots, tables
from evidence.analysis import variant_of
from evidence.arms import BANDS, BASE
from evidence.concepts import SPLITS
from evidence.plan import Plan, at_rank, comparison_cells, equal_rate_cells, variants
from evidence.store import Record


def write_report(records: Sequence[Record], plan: Plan, output: Path) -> None:
    """Print the tables, and write them with the plots to ``output``."""
    text = tables.report(records, plan)
    (output / "report.md").write_text(text)
    print(text)
    test = tables.tested(records, plan)
    ran = {variant_of(record) for record in test}
    for rank in (rank for rank in plan.ranks if any(r == rank for _, r, _ in ran)):
        plots.fronts(test, plan, rank, output / f"front-r{rank}.png")
        plots.over_steps(test, plan, at_rank(plan, rank), output / f"steps-r{rank}.png")
    if len(plan.rates) > 1:
        equal = tables.records_of(records, equal_rate_cells(plan, records))
        plots.fronts(equal, plan, plan.ranks[0], output / "front-equal-rates.png")
    bands = [v for v in variants(plan) if v[0] in BANDS]
    if ran & set(bands):
        plots.over_steps(test, plan, [("lora", plan.ranks[0], 0), *bands], output / "bands.png")
    main = {(BASE, 0, 0), *at_rank(plan, plan.ranks[0])}
    shown = [
        cell
        for cell in comparison_cells(plan, records)
        if cell.seed == 0 and (cell.arm, cell.r, cell.r_min) in main
    ]
    for concept in SPLITS["test"][: plan.test]:
        cells = [cell for cell in shown if cell.concept == concept.name]
        plots.grid(output / "pictures", cells, output / f"grid-{concept.name}.png")
    print(f"wrote {output}/report.md, plots and grids")
