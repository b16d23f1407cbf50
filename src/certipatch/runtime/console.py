"""TODO."""

from __future__ import annotations

from rich.console import Console

stderr = Console(stderr=True, highlight=False)
