"""Reproduce a table: the runs of a recipe, one after the other, through ``train`` and ``certify``.

What is finished is not done again; what was interrupted is continued. The table is written anew after each run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning_fabric import Fabric
from rich import box
from rich.markup import escape
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from . import certification, models, runtime, training
from .config import ModelSpec, TrainConfig
from .cost import BACKWARD, FORWARD
from .data import Source, load_source
from .errors import CertiPatchError, ConfigError, DataError, RecordsError
from .plan import Base, Run, Setup, finished
from .records import read_records


@dataclass(frozen=True)
class Task:
    """A training (no ``patch``) or a certification of what it trained, and what that costs.

    ``passes`` are forward-equivalents of a training, forward passes of a certification at most; ``flops`` count 2 a
    multiply-add.
    """

    training: str
    folder: str
    passes: int
    flops: int
    seconds: float
    finished: bool
    patch: str | None


def run(
    runs: list[Run],
    out: Path,
    *,
    locations: dict[str, str],
    fabric: Callable[[str], Fabric],
    workers: int = 0,
    after_each: Callable[[], object],
) -> list[str]:
    """Do what is not done yet of ``runs`` in the folder ``out``.

    Several processes, here or on other machines, may work on one ``out``: each takes the next run that nobody is at.

    Args:
        locations: where the data sets are that differ from the recipe, by their name.
        fabric: Fabric for a precision.
        after_each: called when a run is complete.

    Returns:
        A line for each run that failed; the others are done all the same.
    """
    failures = []
    for number, one in enumerate(runs, start=1):
        try:
            (out / one.place).mkdir(parents=True, exist_ok=True)
            with FileLock(out / one.place / f".{one.slug}-seed{one.seed}.lock", timeout=0):
                if _done(one, out):
                    continue
                runtime.stderr.print(f"[{number}/{len(runs)}] {one.name}", markup=False, soft_wrap=True)
                _run(one, out, locations, fabric(one.setup.precision), workers)
        except Timeout:
            runtime.stderr.print(f"[{number}/{len(runs)}] {one.name}: another process is at it", markup=False, soft_wrap=True)
        except (CertiPatchError, OSError, torch.OutOfMemoryError) as error:
            failures.append(f"{one.name}: {' '.join(str(error).split())[:300]}")
            runtime.stderr.print(failures[-1], markup=False, soft_wrap=True)
        after_each()
    return failures


def _run(run: Run, out: Path, locations: dict[str, str], fab: Fabric, workers: int) -> None:
    setup = run.setup
    train = _load(setup, locations, "train")
    every = _load(setup, locations, "test")
    test = every.first(run.test_images)
    validation = every.first(max(run.test_images, 4 * len(every.classes)))  # at a small scale too, images of every class
    for what, source, asked in (("training", train, run.train_images), ("test", test, run.test_images)):
        if len(source) < asked:
            raise DataError(f"data {setup.data}: expected at least {asked} {what} images, as the recipe says, found {len(source)}")
    base = out / run.place / "base"
    if setup.base is not None:
        with FileLock(out / run.place / ".base.lock"):  # whoever comes second waits for it
            _train_base(run, setup.base, train, validation, base, fab, workers)
    if not _trained(run, out):
        if setup.base is not None:
            spec, network, _ = models.load_run(base, classes=test.classes)
        else:
            spec = _spec(run, train)
            network = models.build(spec, pretrained=not setup.weights, weights=setup.weights, replace_head=True, seed=run.seed)
        training.train(
            network, spec, train.first(run.train_images), validation, run.config, out / run.name,
            fabric=fab, data=setup.data, workers=workers, resume=True,
        )  # fmt: skip
    for patch, k in run.certifications:
        if not _certified(run, out, patch, k):
            spec, network, _ = models.load_run(out / run.name, classes=test.classes)
            certification.certify(
                network, spec, test, run.masks(patch, k), out / run.certified(patch, k),
                fabric=fab, data=setup.data, trained=run.config.model_dump(mode="json"), resume=True,
            )  # fmt: skip


def _train_base(run: Run, base: Base, train: Source, validation: Source, folder: Path, fab: Fabric, workers: int) -> None:
    if finished(folder):
        return
    spec = _spec(run, train)
    config = TrainConfig(
        strategy="vanilla", patch_size=(1, 1), masks_per_axis=1, epochs=base.epochs, batch_size=run.setup.batch_size, lr=base.lr
    )
    training.train(
        models.build(spec), spec, train.first(run.scaled(base.train_images)), validation, config, folder,
        fabric=fab, data=run.setup.data, workers=workers, resume=True,
    )  # fmt: skip


def _spec(run: Run, source: Source) -> ModelSpec:
    """The paper resizes bicubically, whatever the weights were trained with."""
    spec = models.describe(
        run.arch, classes=source.classes, num_classes=len(source.classes), image_size=run.image_size, crop_pct=run.setup.crop_pct
    )
    return spec.model_copy(update={"interpolation": "bicubic"})


@cache
def _load_source(location: str, split: str, classes: tuple[str, ...] | None) -> Source:
    """A timm name, a folder with a sub-folder for each split, or a folder with a tar for each."""
    tar = os.path.join(location, f"{split}.tar")
    if os.path.isfile(tar):
        return load_source(tar, classes=classes)
    return load_source(location, split=split, classes=classes)


def _load(setup: Setup, locations: dict[str, str], part: str) -> Source:
    location = locations.get(setup.data, setup.location)
    try:
        train = _load_source(location, setup.train_split, None)
        return train if part == "train" else _load_source(location, setup.test_split, train.classes)
    except ConfigError as error:
        raise ConfigError(f"{error} (--data {setup.data}=PLACE says where it is)") from None


def _trained(run: Run, out: Path) -> bool:
    return run.training(out) is not None


def _certified(run: Run, out: Path, patch: str, masks_per_axis: int) -> bool:
    found = run.certification(out, patch, masks_per_axis)
    return found is not None and len(read_records(out / run.certified(patch, masks_per_axis))) == run.test_images


def _done(run: Run, out: Path) -> bool:
    return _trained(run, out) and all(_certified(run, out, *c) for c in run.certifications)


def _is(done: Callable[..., bool], *arguments: Any) -> bool:
    """For the plan: what is there but of another experiment is not done; the run itself will say so."""
    try:
        return done(*arguments)
    except RecordsError:
        return False


# --- The plan --------------------------------------------------------------------------------------------------------


def tasks(runs: list[Run], out: Path, *, fabric: Callable[[str], Fabric], tflops: float | None = None) -> list[Task]:
    """What the runs cost: passes, floating-point operations, and the seconds that they will take.

    Args:
        tflops: the rate (10^12 operations per second) to reckon with; default: each model is timed here for a moment.
    """
    found: list[Task] = []
    for one in runs:
        flops = _flops(one.arch, one.setup.image_size)
        pace = flops / (tflops * 1e12) if tflops else _seconds_per_pass(one.arch, one.setup.image_size, fabric(one.setup.precision))
        base, place = one.setup.base, f"{one.place}/base"
        steps: list[tuple[str, str, int, bool, str | None]] = []
        if base is not None and place not in {task.folder for task in found}:
            steps.append(
                (place, place, one.scaled(base.train_images) * base.epochs * (FORWARD + BACKWARD), finished(out / place) is not None, None)
            )
        steps.append((one.name, one.name, one.train_passes, _is(_trained, one, out), None))
        for patch, k in one.certifications:
            steps.append((one.name, one.certified(patch, k), one.certify_passes(patch, k), _is(_certified, one, out, patch, k), patch))
        found += [Task(where, folder, n, n * flops, n * pace, done, patch) for where, folder, n, done, patch in steps]
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
        passes = [sum(t.passes for t in of_run if (t.patch is None) == training) for training in (True, False)]
        seconds = sum(t.seconds for t in of_run if not t.finished)
        flops = sum(t.flops for t in of_run)
        done = all(t.finished for t in of_run)
        table.add_row(escape(name), f"{passes[0]:,}", f"{passes[1]:,}", f"{flops / 1e12:,.1f}", "done" if done else _span(seconds))
    return table


def plan_json(tasks: list[Task]) -> list[dict[str, Any]]:
    return [{"folder": t.folder, "passes": t.passes, "flops": t.flops, "seconds": t.seconds, "finished": t.finished} for t in tasks]


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@cache
def _flops(arch: str, image_size: int) -> int:
    """Floating-point operations (2 a multiply-add) of one forward pass, counted on a model without weights."""
    with torch.device("meta"):
        network = models.architecture(arch, (image_size, image_size))
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.empty(1, 3, image_size, image_size))
    return int(counter.get_total_flops())


@cache
def _seconds_per_pass(arch: str, image_size: int, fab: Fabric) -> float:
    """Time of one image in a batch, the best of a few on this machine, with random weights."""
    network = models.architecture(arch, (image_size, image_size)).eval().to(fab.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(16, 3, image_size, image_size, device=fab.device).contiguous(memory_format=torch.channels_last)
    best = float("inf")
    with torch.inference_mode(), fab.autocast():
        for _ in range(4):
            started = time.monotonic()
            network(images).sum().item()  # waits for the device
            best = min(best, time.monotonic() - started)
    return best / len(images)
