"""The plots of a report, and its grid of pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from evidence import analysis
from evidence.arms import BANDS, title
from evidence.concepts import CONCEPTS, draw, training_setting
from evidence.plan import Plan, Variant, variants
from evidence.store import Record
from evidence.tables import name_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MEASURES = {
    "overlap": "concept fidelity",
    "alignment": "text alignment",
    "elsewhere_leakage": "leakage of background and place",
    "drift": "drift of unrelated prompts",
}


def fronts(test: Sequence[Record], plan: Plan, rank: int, path: Path) -> None:
    """Alignment against fidelity over the checkpoints of each arm, with bootstrap bands."""
    figure, axes = plt.subplots(figsize=(8, 5))
    reached = [r["overlap"] for r in test if r["r"] in (0, rank)]
    grid = np.linspace(0, max(reached, default=1.0), 400)
    chosen = [v for v in variants(plan) if v[1] == rank and v[0] not in BANDS]
    for variant in chosen:
        checkpoints = [analysis.select(test, variant, step) for step in plan.steps]
        if not any(checkpoints):
            continue
        band = analysis.front_band(checkpoints, grid)
        (line,) = axes.plot(grid, band[0], label=name_of(variant), linewidth=1.5)
        if len(analysis.table(checkpoints[0], "overlap")) >= analysis.ENOUGH:
            axes.fill_between(grid, band[1], band[2], alpha=0.1, color=line.get_color())
        points = [
            [analysis.mean(analysis.table(part, m)) for m in ("overlap", "alignment")]
            for part in checkpoints
            if part
        ]
        axes.plot(*np.array(points).T, "o", markersize=4, color=line.get_color())
    axes.set_xlim(left=0.1)  # what random pictures have
    axes.set(xlabel="concept fidelity (overlap)", ylabel="text alignment", title=f"rank {rank}")
    axes.legend(fontsize=7)
    _save(figure, path)


def over_steps(test: Sequence[Record], plan: Plan, chosen: list[Variant], path: Path) -> None:
    """Each measure over the number of steps."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(4 * len(MEASURES), 3.5))
    for axis, (metric, label) in zip(axes, MEASURES.items(), strict=True):
        for variant in chosen:
            parts = {step: analysis.select(test, variant, step) for step in plan.steps}
            found = {
                step: analysis.bootstrap(analysis.table(part, metric), draws=500)
                for step, part in parts.items()
                if part
            }
            if not found:
                continue
            means = [interval.mean for interval in found.values()]
            (line,) = axis.plot(list(found), means, "o-", markersize=3, label=name_of(variant))
            if any(interval.concepts < analysis.ENOUGH for interval in found.values()):
                continue
            low = [interval.low for interval in found.values()]
            high = [interval.high for interval in found.values()]
            axis.fill_between(list(found), low, high, alpha=0.1, color=line.get_color())
        axis.set(xlabel="steps", title=label)
    axes[0].legend(fontsize=6)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def grid(folder: Path, plan: Plan, concept: str, path: Path) -> bool:
    """A row of pictures for each arm at the last checkpoint; False if there are none."""
    sheets = [(title(arm), folder / f"{concept}.0.{arm}.r{r}.min{r_min}.{step}.png")
              for arm, r, r_min, step in [("base", 0, 0, 0), *((*v, max(plan.steps))
              for v in variants(plan) if v[1] == plan.ranks[0])]]  # fmt: skip
    rows = [(label, Image.open(file)) for label, file in sheets if file.exists()]
    if not rows:
        return False
    label_width, given = 150, CONCEPTS[concept]
    width, height = rows[0][1].size
    sheet = Image.new("RGB", (label_width + width, (height + 4) * (len(rows) + 1)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, height // 2), "the given picture", fill="black")
    sheet.paste(draw(given, training_setting(given)), (label_width, 0))
    for number, (label, picture) in enumerate(rows, start=1):
        top = number * (height + 4)
        pen.text((4, top + height // 2), label, fill="black")
        sheet.paste(picture, (label_width, top))
    sheet.quantize(256).save(path, optimize=True)  # a third of the size, no visible difference
    return True
