"""Reproduce a table: the runs of a recipe, one after the other, through ``train`` and ``certify``.

What is finished is not done again; what was interrupted is continued. The table is written anew after each
run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from lightning_fabric import Fabric

from ..certification.certify import certify
from ..config import ModelSpec
from ..data.load import load_source
from ..data.source import Source
from ..errors import CertiPatchError, ConfigError, DataError
from ..models.build import build, describe
from ..models.runs import load_run
from ..runtime.console import stderr
from ..training.config import TrainConfig
from ..training.train import train as fine_tune
from .plan import Run, _certified, _done, _trained, finished
from .recipe import Base, Setup


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

    Several processes, here or on other machines, may work on one ``out``: each takes the next run that nobody
        is at.

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
                stderr.print(f"[{number}/{len(runs)}] {one.name}", markup=False, soft_wrap=True)
                _run(one, out, locations, fabric(one.setup.precision), workers)
        except Timeout:
            stderr.print(
                f"[{number}/{len(runs)}] {one.name}: another process is at it", markup=False, soft_wrap=True
            )
        except (CertiPatchError, OSError, torch.OutOfMemoryError) as error:
            failures.append(f"{one.name}: {' '.join(str(error).split())[:300]}")
            stderr.print(failures[-1], markup=False, soft_wrap=True)
        after_each()
    return failures


def _run(run: Run, out: Path, locations: dict[str, str], fab: Fabric, workers: int) -> None:
    setup = run.setup
    train = _load(setup, locations, "train")
    every = _load(setup, locations, "test")
    test = every.first(run.test_images)
    validation = every.first(
        max(run.test_images, 4 * len(every.classes))
    )  # at a small scale too, images of every class
    for what, source, asked in (("training", train, run.train_images), ("test", test, run.test_images)):
        if len(source) < asked:
            raise DataError(
                f"data {setup.data}: expected at least {asked} {what} images, as the recipe says, found "
                f"{len(source)}"
            )
    base = out / run.place / "base"
    if setup.base is not None:
        with FileLock(out / run.place / ".base.lock"):  # whoever comes second waits for it
            _train_base(run, setup.base, train, validation, base, fab, workers)
    if not _trained(run, out):
        if setup.base is not None:
            spec, network, _ = load_run(base, classes=test.classes)
        else:
            spec = _spec(run, train)
            network = build(
                spec, pretrained=not setup.weights, weights=setup.weights, replace_head=True, seed=run.seed
            )
        fine_tune(
            network, spec, train.first(run.train_images), validation, run.config, out / run.name,
            fabric=fab, data=setup.data, workers=workers, resume=True,
        )  # fmt: skip
    for patch, k in run.certifications:
        if not _certified(run, out, patch, k):
            spec, network, _ = load_run(out / run.name, classes=test.classes)
            certify(
                network, spec, test, run.masks(patch, k), out / run.certified(patch, k),
                fabric=fab, data=setup.data, trained=run.config.model_dump(mode="json"), resume=True,
            )  # fmt: skip


def _train_base(
    run: Run, base: Base, train: Source, validation: Source, folder: Path, fab: Fabric, workers: int
) -> None:
    if finished(folder):
        return
    spec = _spec(run, train)
    config = TrainConfig(
        strategy="vanilla",
        patch_size=(1, 1),
        masks_per_axis=1,
        epochs=base.epochs,
        batch_size=run.setup.batch_size,
        lr=base.lr,
    )
    fine_tune(
        build(spec), spec, train.first(run.scaled(base.train_images)), validation, config, folder,
        fabric=fab, data=run.setup.data, workers=workers, resume=True,
    )  # fmt: skip


def _spec(run: Run, source: Source) -> ModelSpec:
    """The paper resizes bicubically, whatever the weights were trained with."""
    spec = describe(
        run.arch,
        classes=source.classes,
        num_classes=len(source.classes),
        image_size=run.image_size,
        crop_pct=run.setup.crop_pct,
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
