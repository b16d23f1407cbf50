"""Figure 5 of the paper: certified robust accuracy, and its price in passes, against the masks per axis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..report.certification import Summary
from ..report.figures.style import COLOURS, MARKERS, percents
from .tables import Cell


def against_k(cells: list[Cell], stem: Path) -> list[Path]:
    """Certified robust accuracy and passes against masks per axis, as ``stem``.png and ``stem``.svg.

    A row of two panels for each data set, model and patch; of several seeds the first. Bars are 95 % Wilson
    intervals. Writes nothing, and returns no path, while there is no result.
    """
    found = sorted((cell for cell in cells if cell.summary), key=_place)
    rows = [list(group) for _, group in groupby(found, key=_place)]
    if not rows:
        return []
    figure = Figure(figsize=(7, 2.7 * len(rows) + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), group in zip(panels, rows, strict=True):
        _draw_row(left, right, group)
    paths = [Path(f"{stem}.png"), Path(f"{stem}.svg")]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _place(cell: Cell) -> tuple[str, str]:
    return cell.run.place, cell.patch


def _draw_row(left: Any, right: Any, cells: Sequence[Cell]) -> None:
    """The two panels of one data set, model and patch: accuracy on the left, passes on the right."""
    names = list(dict.fromkeys(cell.run.row for cell in cells))
    for name, colour, marker in zip(names, cycle(COLOURS), cycle(MARKERS), strict=False):
        look = {"color": colour, "marker": marker, "markersize": 4}
        line = _line([cell for cell in cells if cell.run.row == name])
        ks, summaries = list(line), list(line.values())
        heights, reach = percents([summary.certified_robust_accuracy for summary in summaries])
        left.errorbar(ks, heights, yerr=reach, capsize=2, label=name, **look)
        right.plot(ks, [summary.passes / summary.images for summary in summaries], **look)
    most = _all_pairs(cells)
    right.plot(list(most), list(most.values()), color="0.5", linestyle="--", label="all pairs")
    right.set_yscale("log")
    (where, patch), across = _place(cells[0]), "masks per axis k"
    left.set(title=f"{where}, patch {patch}", xlabel=across, ylabel="certified robust\naccuracy (%)")
    left.title.set_fontsize(9)
    right.set(xlabel=across, ylabel="forward passes\nan image")
    for panel in (left, right):
        panel.set_xticks(list(most))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False)


def _line(cells: Sequence[Cell]) -> dict[int, Summary]:
    """The results of one row of a table by k, of its first seed."""
    seed = min(cell.run.seed for cell in cells)
    found = {cell.masks_per_axis: cell.summary for cell in cells if cell.run.seed == seed}
    return {k: summary for k, summary in sorted(found.items()) if summary}


def _all_pairs(cells: Sequence[Cell]) -> dict[int, float]:
    """How many pairs of masks there are by k: the passes of a certificate that is not refuted early."""
    masks = {cell.masks_per_axis: len(cell.run.masks(cell.patch, cell.masks_per_axis)) for cell in cells}
    return {k: n * (n + 1) / 2 for k, n in sorted(masks.items())}
