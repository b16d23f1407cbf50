"""The two consoles: results go to standard output, what a run is doing to standard error.

In a run of several processes all but the first are silenced (``stderr.quiet``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


class _Speaking(Console):
    """A console that knows how often something was printed on it."""

    said = 0

    def print(self, *objects: Any, **options: Any) -> None:
        self.said += 1
        super().print(*objects, **options)


stdout = Console(highlight=False)
stderr = _Speaking(stderr=True, highlight=False)


def said() -> int:
    """How often something was printed on standard error."""
    return stderr.said


def say(line: str) -> None:
    """A line on standard error, as it is."""
    stderr.print(line, markup=False, soft_wrap=True)


def print_table(table: Table, console: Console = stdout) -> None:
    """Print a table; where the terminal is too narrow for its numbers, each row below the other, in full."""
    for column in table.columns:
        column.no_wrap = column.no_wrap or column.justify == "right"
    if sum(_least_width(column) + 1 for column in table.columns) + 2 <= console.width:
        console.print(table)
        return
    for line in _below_each_other(table):
        console.print(line)
    if table.caption:
        console.print(table.caption)


def _below_each_other(table: Table) -> Iterator[str]:
    """Each row as lines: its first cell, then the others, each with its heading."""
    headings = [_in_one_line(str(column.header)) for column in table.columns]
    rows = [*zip(*(column.cells for column in table.columns), strict=True)]
    rows += [tuple(column.footer for column in table.columns)] if table.show_footer else []
    for row in rows:
        first, *rest = (" ".join(str(cell).split()) for cell in row)
        lines = [f"  {name}: {cell}" for name, cell in zip(headings[1:], rest, strict=True) if cell]
        yield "\n".join([first or "-", *lines])


def _least_width(column: Column) -> int:
    """Characters that a column needs so that nothing in it is cut; what may be folded needs few."""
    if column.overflow == "fold":
        return column.min_width or 1
    texts = [Text.from_markup(str(cell)) for cell in (column.header, *column.cells, column.footer)]
    return max(line.cell_len for text in texts for line in text.split())


def _in_one_line(heading: str) -> str:
    r"""``thres-\nhold`` -> ``threshold``, ``passes/\nimage`` -> ``passes/image``."""
    return " ".join(re.sub(r"(?<=/)\n|-\n", "", heading).split())
