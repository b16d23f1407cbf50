"""Benchmarks on a model and data of one's own: certification against the published code, training, memory,
processes.

Each theme is one function, in the order of :data:`THEMES`; it returns rows with the value of every round, and
what else to know. The rounds of what is compared are interleaved (A B A B ...), so that what slows the
machine down for a while slows both, and a ratio is taken within a round. No certification is timed before its
answers have been compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from ..defenses.contract import Verdict
from ..defenses.patchcleanser.defense import PatchCleanser
from ..runtime.console import stderr

LEAST_SECONDS = 1.0  # that a forward pass is repeated for


Rows = list[dict[str, Any]]


def _pace(action: Callable[[], object]) -> float:
    """Seconds of one call, over as many as fit into :data:`LEAST_SECONDS`."""
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < LEAST_SECONDS or not calls:
        action()
        _wait()
        calls += 1
    return elapsed / calls


def interleaved(repeats: int, *actions: Callable[[], object]) -> list[list[float]]:
    """The seconds of each action in each round, A B A B ..."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for action, of_action in zip(actions, seconds, strict=True):
            started = time.perf_counter()
            action()
            _wait()
            of_action.append(time.perf_counter() - started)
    return seconds


def row(
    what: str, unit: str, rounds: Sequence[float], passes: float | None = None, ratios: Sequence[float] = ()
) -> dict[str, Any]:
    """One thing measured, once a round; ``passes``: forward passes' worth of an image; ``ratios``: see
    :data:`THEMES`."""

    def spread(values: Sequence[float]) -> dict[str, Any]:
        return {"median": median(values), "min": min(values), "max": max(values), "rounds": list(values)}

    return {
        "what": what,
        "unit": unit,
        **spread(rounds),
        "passes_per_image": passes,
        "ratio": spread(ratios) if ratios else None,
    }


def table(found: dict[str, Any]) -> Table:
    """What :func:`run` returns, 80 columns wide."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    out.add_column("", overflow="fold", min_width=16)
    for heading in ("", "median", "range", "passes/\nimage", "ratio", "range"):
        out.add_column(heading, justify="right", no_wrap=True)
    notes = []
    for theme, result in found["results"].items():
        out.add_row(f"[bold]{theme}[/bold]")
        for one in result["rows"]:
            ratio, passes = one["ratio"], one["passes_per_image"]
            shown = [
                one["unit"],
                f"{one['median']:.3g}",
                f"{one['min']:.3g}-{one['max']:.3g}",
                f"{passes:.0f}" if passes else "",
            ]
            out.add_row(
                escape(one["what"]),
                *shown,
                *([f"{ratio['median']:.3g}", f"{ratio['min']:.3g}-{ratio['max']:.3g}"] if ratio else []),
            )
        notes += [f"{theme}: ratio = {result['ratio']}", *(f"{theme}: {note}" for note in result["notes"])]
    out.caption = escape("\n".join(notes))
    return out


def _quotients(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def _shown(defense: PatchCleanser) -> str:
    """What of the settings is in effect: not every network can be compiled, or has a shared prefix."""
    network = defense.network
    on = [
        network.compiled and "compiled",
        network.prefix and "shared prefix",
        defense.exhaustive and "exhaustive",
    ]
    return ", ".join([network.precision, f"batch {network.batch_size}", *(word for word in on if word)])


def _outcome(verdict: Verdict) -> tuple[bool | None, int, float]:
    return verdict.certified, verdict.defended_label, verdict.margin


def _wait() -> None:
    """For what a GPU has been asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress of the trainings inside."""
    before, stderr.quiet = stderr.quiet, True
    try:
        yield
    finally:
        stderr.quiet = before


def _processor() -> str | None:
    """The name of the CPU, where Linux says it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
