"""The two consoles: results go to standard output, what a run is doing to standard error.

In a run of several processes all but the first are silenced (``stderr.quiet``).
"""

from __future__ import annotations

from rich.console import Console

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)
