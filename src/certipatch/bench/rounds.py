"""Rounds: what is compared is timed in turn (A B A B ...), and every value is kept, in a row of the results.

What slows the machine down for a while then slows both, and a ratio is taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch


def interleaved(repeats: int, *actions: Callable[[], object]) -> list[list[float]]:
    """The seconds of each action in each round; a round runs every action once, in turn."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for action, of_action in zip(actions, seconds, strict=True):
            started = time.perf_counter()
            action()
            wait_for_gpu()
            of_action.append(time.perf_counter() - started)
    return seconds


def wait_for_gpu() -> None:
    """Return when a GPU, if there is one, has done all that it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quotients(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """One thing's value over the other's, in each round."""
    return [a / b for a, b in zip(one, other, strict=True)]


def row(
    what: str, unit: str, rounds: Sequence[float], passes: float | None = None, ratios: Sequence[float] = ()
) -> dict[str, Any]:
    """The row of one thing that was measured, with its value in each round.

    Args:
        passes: for one image, in forward passes' worth of time.
        ratios: in each round; what they are a ratio of stands in :data:`~certipatch.bench.run.THEMES`.
    """
    return {
        "what": what,
        "unit": unit,
        **_spread(rounds),
        "passes_per_image": passes,
        "ratio": _spread(ratios) if ratios else None,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "rounds": list(values)}
