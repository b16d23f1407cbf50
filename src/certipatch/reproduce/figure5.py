"""TODO."""

from __future__ import annotations

from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..report.figures.style import COLOURS, MARKERS, percents

if TYPE_CHECKING:
    from .tables import Cell


def against_k(cells: list[Cell], stem: Path) -> list[Path]:
    """Certified robust accuracy and passes against masks per axis (Figure 5), as ``stem``.png and
    ``stem``.svg.

    A row of two panels for each data set, model and patch; of several seeds the first. Bars are 95 % Wilson
    intervals. Writes nothing, and returns no path, while there is no result.
    """

    def place(cell: Cell) -> tuple[str, str]:
        return cell.run.place, cell.patch

    found = sorted((cell for cell in cells if cell.summary), key=place)
    rows = [(key, list(group)) for key, group in groupby(found, key=place)]
    if not rows:
        return []
    figure = Figure(figsize=(7, 2.7 * len(rows) + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), ((where, patch), group) in zip(panels, rows, strict=True):
        names = list(dict.fromkeys(cell.run.row for cell in group))
        for name, colour, marker in zip(names, cycle(COLOURS), cycle(MARKERS), strict=False):
            of_row = [cell for cell in group if cell.run.row == name]
            seed = min(cell.run.seed for cell in of_row)
            line = sorted(
                ((c.masks_per_axis, c.summary) for c in of_row if c.run.seed == seed and c.summary),
                key=lambda point: point[0],
            )
            ks = [k for k, _ in line]
            heights, reach = percents([s.certified_robust_accuracy for _, s in line])
            left.errorbar(
                ks, heights, yerr=reach, color=colour, marker=marker, markersize=4, capsize=2, label=name
            )
            right.plot(
                ks,
                [s.passes / s.certified_robust_accuracy.images for _, s in line],
                color=colour,
                marker=marker,
                markersize=4,
            )
        most = sorted({(c.masks_per_axis, len(c.run.masks(c.patch, c.masks_per_axis))) for c in group})
        right.plot(
            [k for k, _ in most],
            [n * (n + 1) / 2 for _, n in most],
            color="0.5",
            linestyle="--",
            label="all pairs",
        )
        right.set_yscale("log")
        left.set(
            title=f"{where}, patch {patch}",
            xlabel="masks per axis k",
            ylabel="certified robust\naccuracy (%)",
        )
        right.set(xlabel="masks per axis k", ylabel="forward passes\nan image")
        left.title.set_fontsize(9)
        for panel in (left, right):
            panel.set_xticks([k for k, _ in most])
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8, frameon=False)
    paths = [Path(f"{stem}.png"), Path(f"{stem}.svg")]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
