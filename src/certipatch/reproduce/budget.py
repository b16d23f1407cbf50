"""What runs will cost before they are done: passes, floating-point operations, and seconds on this machine.

``certipatch reproduce --dry-run`` shows it; a command that has something to do shows what is left of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from .done import finished, is_certified, training
from .plan import Run


@dataclass(frozen=True)
class Pass:
    """What one forward pass of one image costs; ``flops`` count 2 a multiply-add."""

    flops: int
    seconds: float


@dataclass(frozen=True)
class Task:
    """A training, or a certification of what it trained.

    Attributes:
        training: the folder of the training. folder: the task's own.
        passes: forward-equivalents of a training, forward passes of a certification at most.
        each: what one of them costs.
        patch: what is certified against, as it is typed; None for a training.
    """

    training: str
    folder: str
    passes: int
    each: Pass
    finished: bool
    patch: str | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations of all passes, 2 a multiply-add."""
        return self.passes * self.each.flops

    @property
    def seconds(self) -> float:
        """How long all passes will take."""
        return self.passes * self.each.seconds


def tasks(
    runs: list[Run], out: Path, *, fabric: Callable[[str], Fabric], tflops: float | None = None
) -> list[Task]:
    """What the runs consist of, and what each part costs.

    Args:
        tflops: the rate (10^12 operations per second) to reckon with; default: each model is timed here for a
            moment.
    """
    found: list[Task] = []
    for run in runs:
        each = _one_pass(run, fabric, tflops)
        if run.setup.base is not None and run.base not in [task.folder for task in found]:
            done = finished(out / run.base) is not None
            found.append(Task(run.base, run.base, run.base_passes, each, done))
        found.append(Task(run.name, run.name, run.train_passes, each, _is_trained(run, out)))
        for patch, k in run.certifications:
            passes, done = run.certify_passes(patch, k), _is_certified(run, out, patch, k)
            found.append(Task(run.name, run.certified(patch, k), passes, each, done, patch))
    return found


def _is_trained(run: Run, out: Path) -> bool:
    """Whether the run is trained.

    A folder of another experiment counts as not trained here; the run itself will refuse it.
    """
    try:
        return training(run, out) is not None
    except RecordsError:
        return False


def _is_certified(run: Run, out: Path, patch: str, masks_per_axis: int) -> bool:
    """Whether one certification is complete; a folder of another experiment counts as not."""
    try:
        return is_certified(run, out, patch, masks_per_axis)
    except RecordsError:
        return False


def plan_table(tasks: list[Task]) -> Table:
    """A line for each folder of a training, with what is left to do there."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left", show_footer=True)
    table.caption = (
        "Certify passes: at most; wrong pairs that are met early make it less. The time is what is left "
        "to do."
    )
    headings = ("train passes", "certify passes", "TFLOP", "time")
    totals = (*_passes(tasks), f"{_tflop(tasks):,.0f}", _time_left(tasks))
    table.add_column("training", "total", overflow="fold")
    for heading, total in zip(headings, totals, strict=True):
        table.add_column(heading, total, justify="right")
    for name, group in groupby(tasks, key=lambda task: task.training):
        of_run = list(group)
        left = "done" if all(task.finished for task in of_run) else _time_left(of_run)
        table.add_row(escape(name), *_passes(of_run), f"{_tflop(of_run):,.1f}", left)
    return table


def _passes(tasks: Sequence[Task]) -> tuple[str, str]:
    """The passes of the trainings, and those of the certifications."""
    to_train = sum(task.passes for task in tasks if task.patch is None)
    to_certify = sum(task.passes for task in tasks if task.patch is not None)
    return f"{to_train:,}", f"{to_certify:,}"


def _tflop(tasks: Sequence[Task]) -> float:
    return sum(task.flops for task in tasks) / 1e12


def _time_left(tasks: Sequence[Task]) -> str:
    return str(timedelta(seconds=round(sum(task.seconds for task in tasks if not task.finished))))


def plan_json(tasks: list[Task]) -> list[dict[str, Any]]:
    """The tasks as ``reproduce --dry-run --json`` prints them."""
    shown = ("folder", "passes", "flops", "seconds", "finished")
    return [{name: getattr(task, name) for name in shown} for task in tasks]


def _one_pass(run: Run, fabric: Callable[[str], Fabric], tflops: float | None) -> Pass:
    """What a pass of the run's model costs, at the rate asked for or else as it is timed here."""
    size = run.setup.image_size
    flops = _flops(run.arch, size)
    if tflops:
        return Pass(flops, flops / (tflops * 1e12))
    return Pass(flops, _seconds_per_pass(run.arch, size, fabric(run.setup.precision)))


@cache
def _flops(arch: str, image_size: int) -> int:
    """Floating-point operations of one forward pass, 2 a multiply-add, counted without weights."""
    with torch.device("meta"):
        network = architecture(arch, (image_size, image_size))
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.empty(1, 3, image_size, image_size))
    return int(counter.get_total_flops())


@cache
def _seconds_per_pass(arch: str, image_size: int, fabric: Fabric) -> float:
    """Time of one image in a batch, the best of a few on this machine, with random weights."""
    network = architecture(arch, (image_size, image_size)).eval()
    network.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(16, 3, image_size, image_size, device=fabric.device)
    images = images.contiguous(memory_format=torch.channels_last)
    best = float("inf")
    with torch.inference_mode(), fabric.autocast():
        for _ in range(4):
            started = time.monotonic()
            network(images).sum().item()  # waits for the device
            best = min(best, time.monotonic() - started)
    return best / len(images)
