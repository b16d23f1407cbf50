"""The table of results that ``certipatch bench`` prints."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table


def table(found: dict[str, Any]) -> Table:
    """What :func:`certipatch.bench.run.run` returns, as a table 80 columns wide."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    out.add_column("", overflow="fold", min_width=16)
    for heading in ("", "median", "range", "passes/\nimage", "ratio", "range"):
        out.add_column(heading, justify="right", no_wrap=True)
    notes = []
    for theme, result in found["results"].items():
        out.add_row(f"[bold]{theme}[/bold]")
        for row in result["rows"]:
            out.add_row(*_cells(row))
        notes += [f"{theme}: ratio = {result['ratio']}", *(f"{theme}: {note}" for note in result["notes"])]
    out.caption = escape("\n".join(notes))
    return out


def _cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row that :func:`certipatch.bench.rounds.row` made."""
    passes = row["passes_per_image"]
    cells = [escape(row["what"]), row["unit"], *_median_and_range(row), f"{passes:.0f}" if passes else ""]
    return [*cells, *_median_and_range(row["ratio"])] if row["ratio"] else cells


def _median_and_range(spread: dict[str, Any]) -> list[str]:
    return [f"{spread['median']:.3g}", f"{spread['min']:.3g}-{spread['max']:.3g}"]
