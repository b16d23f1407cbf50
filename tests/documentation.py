"""The pages of the documentation and what is to be typed in them, as scripts/docs_commands.py finds it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from docs_commands import PAGES, Block, as_run, blocks, executed  # noqa: E402

__all__ = ["PAGES", "ROOT", "Block", "as_run", "blocks", "executed"]
