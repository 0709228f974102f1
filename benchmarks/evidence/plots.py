"""The plots of a report, and its grid of pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from evidence import analysis
from evidence.arms import title
from evidence.concepts import CONCEPTS, asked_settings, draw, training_setting
from evidence.plan import Plan, Variant, at_rank
from evidence.store import Record
from evidence.tables import name_of
from evidence.trial import ASKED, Cell

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
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    reached = [r["overlap"] for r in test if r["r"] in (0, rank)]
    grid, chosen = np.linspace(0, max(reached, default=1.0), 400), at_rank(plan, rank)
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
    axes.set_xlim(left=0.1)  # pictures of noise have 0.12
    axes.set(xlabel="concept fidelity (overlap)", ylabel="text alignment", title=f"rank {rank}")
    axes.legend(fontsize=7, loc="lower left")
    _save(figure, path)


def over_steps(test: Sequence[Record], plan: Plan, chosen: list[Variant], path: Path) -> None:
    """Each measure over the number of steps."""
    size = (4 * len(MEASURES), 4)
    figure, axes = plt.subplots(1, len(MEASURES), figsize=size, layout="constrained")
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
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside lower center")
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def grid(folder: Path, cells: Sequence[Cell], path: Path) -> bool:
    """A row of pictures for each trial at its last checkpoint; False if there are none.

    Over the columns stands what was asked: place, background and texture, or nothing at all.
    """
    files = {title(cell.arm): folder / cell.picture_name(max(cell.steps)) for cell in cells}
    rows = {label: Image.open(file) for label, file in files.items() if file.exists()}
    if not rows:
        return False
    label_width, given = 150, CONCEPTS[cells[0].concept]
    width, height = next(iter(rows.values())).size
    sheet = Image.new("RGB", (label_width + width, (height + 4) * (len(rows) + 1)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 18), "the given\npicture", fill="black")
    sheet.paste(draw(given, training_setting(given)), (label_width - height - 8, 0))
    captions = [f"{s.position}\n{s.background}\n{s.texture}" for s in asked_settings(given, ASKED)]
    bare = ["bare\nprompt"] * (width // height - ASKED)
    for column, caption in enumerate(captions + bare):
        pen.text((label_width + column * height, 18), caption, fill="black")
    for number, (label, picture) in enumerate(rows.items(), start=1):
        top = number * (height + 4)
        pen.text((4, top + height // 2), label, fill="black")
        sheet.paste(picture, (label_width, top))
    sheet.quantize(256).save(path, optimize=True)  # a third of the size, no visible difference
    return True
