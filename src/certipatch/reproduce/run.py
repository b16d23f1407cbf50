"""Reproduce a table: the runs of a recipe, one after the other, through ``train`` and ``certify``.

What is finished is not done again; what was interrupted is continued.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from lightning_fabric import Fabric

from ..certification.certify import certify
from ..config import ModelSpec
from ..data.load import load_source
from ..data.source import Source
from ..errors import CertiPatchError, ConfigError, DataError, brief, one_line
from ..models.build import build, describe
from ..models.runs import Opened, open_run
from ..runtime.console import stderr
from ..training.config import TrainConfig
from ..training.train import train as fine_tune
from .done import finished, is_certified, is_done, training
from .plan import Run
from .recipe import Base, Setup

say = partial(stderr.print, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Place:
    """Where runs are done, and with what.

    Attributes:
        out: the folder that the folders of all runs are in.
        locations: where the data sets are that differ from the recipe, by their name.
        fabric: of the precision of the runs.
        workers: processes that read images in training.
    """

    out: Path
    locations: dict[str, str]
    fabric: Fabric
    workers: int


@dataclass(frozen=True)
class Sources:
    """The images of a run.

    Attributes:
        train: all that there are to train on; a run takes some of them.
        validation: what vanilla accuracy is measured on after each epoch.
        test: the images to certify.
    """

    train: Source
    validation: Source
    test: Source


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
        fabric: Fabric for a precision. after_each: called after each run that was not complete before.

    Returns a line for each run that failed; the others are done all the same.
    """
    failures = []
    for number, one in enumerate(runs, start=1):
        title = f"[{number}/{len(runs)}] {one.name}"
        try:
            (out / one.place).mkdir(parents=True, exist_ok=True)
            with FileLock(out / one.place / f".{one.slug}-seed{one.seed}.lock", timeout=0):
                if is_done(one, out):
                    continue
                say(title)
                _do(one, Place(out, locations, fabric(one.setup.precision), workers))
        except Timeout:
            say(f"{title}: another process is at it")
        except (CertiPatchError, OSError, torch.OutOfMemoryError) as error:
            failures.append(f"{one.name}: {brief(error, 300)}")
            say(failures[-1])
        after_each()
    return failures


def _do(run: Run, place: Place) -> None:
    """Train what the run begins with and the run itself, and certify it, each unless it is done already."""
    sources = _sources_of(run, place.locations)
    base = run.setup.base
    if base is not None:
        with FileLock(place.out / run.place / ".base.lock"):  # whoever comes second waits for it
            _train_base(run, base, sources, place)
    if training(run, place.out) is None:
        _train(run, sources, place)
    _certify(run, sources.test, place)


def _train_base(run: Run, base: Base, sources: Sources, place: Place) -> None:
    """Train the network that all runs of this data set and model begin with, on whole images."""
    folder = place.out / run.base
    if finished(folder):
        return
    spec = _spec(run, sources.train)
    config = TrainConfig(
        strategy="vanilla",
        patch_size=(1, 1),
        masks_per_axis=1,
        epochs=base.epochs,
        batch_size=run.setup.batch_size,
        lr=base.lr,
    )
    fine_tune(
        build(spec),
        spec,
        sources.train.first(run.scaled(base.train_images)),
        sources.validation,
        config,
        folder,
        fabric=place.fabric,
        data=run.setup.data,
        workers=place.workers,
        resume=True,
    )


def _train(run: Run, sources: Sources, place: Place) -> None:
    """The training of a run, from its base or from the weights that its setup names."""
    setup = run.setup
    if setup.base is not None:
        base = open_run(place.out / run.base, classes=sources.test.classes)
        spec, network = base.spec, base.network
    else:
        spec = _spec(run, sources.train)
        network = build(
            spec, pretrained=not setup.weights, weights=setup.weights, replace_head=True, seed=run.seed
        )
    fine_tune(
        network,
        spec,
        sources.train.first(run.train_images),
        sources.validation,
        run.config,
        place.out / run.name,
        fabric=place.fabric,
        data=setup.data,
        workers=place.workers,
        resume=True,
    )


def _certify(run: Run, test: Source, place: Place) -> None:
    """The certifications of a run that are not complete; its model is opened once for all."""
    opened: Opened | None = None
    for patch, k in run.certifications:
        if is_certified(run, place.out, patch, k):
            continue
        opened = opened or open_run(place.out / run.name, classes=test.classes)
        folder, masks = place.out / run.certified(patch, k), run.masks(patch, k)
        certify(
            opened,
            test,
            masks,
            folder,
            fabric=place.fabric,
            data=run.setup.data,
            resume=True,
            places=run.setup.places,
        )


def _spec(run: Run, source: Source) -> ModelSpec:
    """The model as the paper evaluates it: resized bicubically, whatever the weights were trained with."""
    spec = describe(
        run.arch,
        classes=source.classes,
        num_classes=len(source.classes),
        image_size=run.setup.size,
        crop_pct=run.setup.crop_pct,
    )
    return spec.model_copy(update={"interpolation": "bicubic"})


def _sources_of(run: Run, locations: dict[str, str]) -> Sources:
    """The images of a run. Raises DataError if there are fewer than the recipe says."""
    train, every = _load(run.setup, locations, "train"), _load(run.setup, locations, "test")
    test = every.first(run.test_images)
    validation = every.first(max(run.test_images, 4 * len(every.classes)))  # of every class, at any scale
    for what, source, asked in (("training", train, run.train_images), ("test", test, run.test_images)):
        if len(source) < asked:
            raise DataError(
                f"data {run.setup.data}: expected at least {asked} {what} images, as the recipe says, found "
                f"{len(source)}"
            )
    return Sources(train, validation, test)


def _load(setup: Setup, locations: dict[str, str], part: str) -> Source:
    """The images of a setup to train on, or to test with."""
    location = locations.get(setup.data, setup.location)
    try:
        train = load(location, setup.train_split, None)
        return train if part == "train" else load(location, setup.test_split, train.classes)
    except ConfigError as error:
        raise ConfigError(f"{error} (--data {setup.data}=PLACE says where it is)") from None


@cache
def load(location: str, split: str, classes: tuple[str, ...] | None) -> Source:
    """A timm name, a folder with a sub-folder for each split, or a folder with a tar for each."""
    tar = os.path.join(location, f"{split}.tar")
    packed = os.path.isfile(tar)
    source = load_source(tar if packed else location, split=None if packed else split, classes=classes)
    for line in source.remarks:
        stderr.print(one_line(line), markup=False, soft_wrap=True)
    return source
