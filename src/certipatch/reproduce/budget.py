"""TODO."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich import box
from rich.markup import escape
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from ..errors import RecordsError
from ..models.build import architecture
from ..training.cost import BACKWARD, FORWARD
from .plan import Run, _certified, _trained, finished


@dataclass(frozen=True)
class Task:
    """A training (no ``patch``) or a certification of what it trained, and what that costs.

    ``passes`` are forward-equivalents of a training, forward passes of a certification at most; ``flops``
    count 2 a multiply-add.
    """

    training: str
    folder: str
    passes: int
    flops: int
    seconds: float
    finished: bool
    patch: str | None


def _is(done: Callable[..., bool], *arguments: Any) -> bool:
    """For the plan: what is there but of another experiment is not done; the run itself will say so."""
    try:
        return done(*arguments)
    except RecordsError:
        return False


def tasks(
    runs: list[Run], out: Path, *, fabric: Callable[[str], Fabric], tflops: float | None = None
) -> list[Task]:
    """What the runs cost: passes, floating-point operations, and the seconds that they will take.

    Args:
        tflops: the rate (10^12 operations per second) to reckon with; default: each model is timed here for a
            moment.
    """
    found: list[Task] = []
    for one in runs:
        flops = _flops(one.arch, one.setup.image_size)
        pace = (
            flops / (tflops * 1e12)
            if tflops
            else _seconds_per_pass(one.arch, one.setup.image_size, fabric(one.setup.precision))
        )
        base, place = one.setup.base, f"{one.place}/base"
        steps: list[tuple[str, str, int, bool, str | None]] = []
        if base is not None and place not in {task.folder for task in found}:
            steps.append(
                (
                    place,
                    place,
                    one.scaled(base.train_images) * base.epochs * (FORWARD + BACKWARD),
                    finished(out / place) is not None,
                    None,
                )
            )
        steps.append((one.name, one.name, one.train_passes, _is(_trained, one, out), None))
        for patch, k in one.certifications:
            steps.append(
                (
                    one.name,
                    one.certified(patch, k),
                    one.certify_passes(patch, k),
                    _is(_certified, one, out, patch, k),
                    patch,
                )
            )
        found += [
            Task(where, folder, n, n * flops, n * pace, done, patch)
            for where, folder, n, done, patch in steps
        ]
    return found


def plan_table(tasks: list[Task]) -> Table:
    """A line for each folder of a training, with what is left to do there."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left", show_footer=True)
    table.caption = "Certify passes: at most; wrong pairs that are met early make it less. The time is what is left to do."
    left = [task for task in tasks if not task.finished]
    table.add_column("training", "total", overflow="fold")
    for heading, value in (
        ("train passes", f"{sum(t.passes for t in tasks if t.patch is None):,}"),
        ("certify passes", f"{sum(t.passes for t in tasks if t.patch is not None):,}"),
        ("TFLOP", f"{sum(t.flops for t in tasks) / 1e12:,.0f}"),
        ("time", _span(sum(t.seconds for t in left))),
    ):
        table.add_column(heading, value, justify="right")
    for name, group in groupby(tasks, key=lambda task: task.training):
        of_run = list(group)
        passes = [
            sum(t.passes for t in of_run if (t.patch is None) == training) for training in (True, False)
        ]
        seconds = sum(t.seconds for t in of_run if not t.finished)
        flops = sum(t.flops for t in of_run)
        done = all(t.finished for t in of_run)
        table.add_row(
            escape(name),
            f"{passes[0]:,}",
            f"{passes[1]:,}",
            f"{flops / 1e12:,.1f}",
            "done" if done else _span(seconds),
        )
    return table


def plan_json(tasks: list[Task]) -> list[dict[str, Any]]:
    return [
        {
            "folder": t.folder,
            "passes": t.passes,
            "flops": t.flops,
            "seconds": t.seconds,
            "finished": t.finished,
        }
        for t in tasks
    ]


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@cache
def _flops(arch: str, image_size: int) -> int:
    """Floating-point operations (2 a multiply-add) of one forward pass, counted on a model without
    weights."""
    with torch.device("meta"):
        network = architecture(arch, (image_size, image_size))
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.empty(1, 3, image_size, image_size))
    return int(counter.get_total_flops())


@cache
def _seconds_per_pass(arch: str, image_size: int, fab: Fabric) -> float:
    """Time of one image in a batch, the best of a few on this machine, with random weights."""
    network = (
        architecture(arch, (image_size, image_size)).eval().to(fab.device, memory_format=torch.channels_last)
    )  # type: ignore[call-overload]
    images = torch.rand(16, 3, image_size, image_size, device=fab.device).contiguous(
        memory_format=torch.channels_last
    )
    best = float("inf")
    with torch.inference_mode(), fab.autocast():
        for _ in range(4):
            started = time.monotonic()
            network(images).sum().item()  # waits for the device
            best = min(best, time.monotonic() - started)
    return best / len(images)
