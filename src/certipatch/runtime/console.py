"""The two consoles: results go to standard output, what a run is doing to standard error.

In a run of several processes all but the first are silenced (``stderr.quiet``).
"""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.table import Table

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def print_table(table: Table, console: Console = stdout) -> None:
    """Print a table; where the terminal is too narrow for its numbers, each row below the other, in full."""
    for column in table.columns:
        column.no_wrap = column.no_wrap or column.justify == "right"
    if console.measure(table, options=console.options.update(max_width=sys.maxsize)).minimum <= console.width:
        console.print(table)
        return
    headings = [_in_one_line(str(column.header)) for column in table.columns]
    rows = [*zip(*(column.cells for column in table.columns), strict=True)]
    rows += [tuple(column.footer for column in table.columns)] if table.show_footer else []
    for row in rows:
        first, *rest = (" ".join(str(cell).split()) for cell in row)
        lines = [f"  {name}: {cell}" for name, cell in zip(headings[1:], rest, strict=True) if cell]
        console.print("\n".join([first or "-", *lines]))
    if table.caption:
        console.print(table.caption)


def _in_one_line(heading: str) -> str:
    r"""``thres-\nhold`` -> ``threshold``, ``passes/\nimage`` -> ``passes/image``."""
    return " ".join(re.sub(r"(?<=/)\n|-\n", "", heading).split())
