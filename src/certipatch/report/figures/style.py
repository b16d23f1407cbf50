"""How all figures look: sizes, type, and colours that everybody can tell apart.

The files of a figure have the same bytes each time that it is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ...records.files import write_atomically
from ..places import ShareOfPlaces
from ..shares import Share

# Okabe-Ito: told apart by everybody.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")
COLUMN, PAGE = 3.3, 7.0  # widths in inches
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib: the same picture on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "legend.frameon": False,
    "text.parse_math": False,  # names of models and classes are text
    "svg.fonttype": "path",
    "svg.hashsalt": "certipatch",
}


def percents(shares: Sequence[Share | ShareOfPlaces]) -> tuple[list[float], list[list[float]]]:
    """The shares in %, and how far their 95 % intervals reach below and above."""
    shown = [share.percent for share in shares]
    ends = [share.interval for share in shares]
    low = [p - 100 * low for p, (low, _) in zip(shown, ends, strict=True)]
    high = [100 * high - p for p, (_, high) in zip(shown, ends, strict=True)]
    return shown, [low, high]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
    FigureCanvasAgg(figure)
    return figure


def save(
    figures: Mapping[str, Figure], folder: Path, *, endings: tuple[str, ...] = ("svg", "png"), dpi: int = 300
) -> list[Path]:
    """Write each figure as ``folder``/name.svg and .png, in the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for ending in endings:
            data = io.BytesIO()
            with mpl.rc_context(STYLE):
                undated = {"Date": None} if ending == "svg" else {}
                figure.savefig(data, format=ending, dpi=dpi, metadata=undated)
            paths.append(folder / f"{name}.{ending}")
            write_atomically(paths[-1], data.getvalue())
    return paths
