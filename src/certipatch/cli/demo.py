"""``certipatch demo``: the whole story on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as ask


def demo(
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("demo-out"),
    seed: ask.Seed = 0,
    as_json: ask.AsJson = False,
) -> None:
    """Greedy Cutout on handwritten digits, in a few minutes: train, certify, compare."""
    from ..demo import run

    run(out, seed=seed, as_json=as_json)
