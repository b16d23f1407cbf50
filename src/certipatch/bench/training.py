"""The theme ``train``: the seconds of a training step under each strategy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..data.source import Source
from ..records.read import read_lines
from ..records.schema import EPOCHS
from ..runtime.console import stderr
from ..training.config import train_config
from ..training.strategies import STRATEGIES
from ..training.train import train
from .case import Case
from .rounds import quotients, row


def training_steps(case: Case) -> dict[str, Any]:
    """Seconds of a step (masking with its search, forward, backward, update), by strategy.

    They are measured in epochs that ``train`` itself runs, after one round that warms up.
    """
    source = _without_empty_classes(case.source)
    names = list(dict.fromkeys(["vanilla", *case.strategies]))
    with _quiet():
        rounds = [[_time_steps(case, source, name) for name in names] for _ in range(case.repeats + 1)][1:]
    seconds = {name: [found[i].seconds for found in rounds] for i, name in enumerate(names)}
    passes = {name: rounds[0][i].passes for i, name in enumerate(names)}
    images = _images_in_a_step(case)
    return {
        "rows": [
            row(name, "s/step", of_all, passes[name], quotients(of_all, seconds["vanilla"]))
            for name, of_all in seconds.items()
        ],
        "batch_size": images,
        "notes": [
            f"{images} images in a step, {case.settings.precision}; passes: forward passes' worth of search "
            "and gradient step",
            *(f"{name.replace('_', ' ')}: {value}" for name, value in case.search.items()),
        ],
    }


@dataclass(frozen=True)
class _Step:
    """Seconds of a step, and forward passes' worth of an image in it."""

    seconds: float
    passes: float


def _time_steps(case: Case, source: Source, strategy: str) -> _Step:
    """The mean step of a short training run of a copy of the network."""
    search = case.search if STRATEGIES[strategy].by == "loss" else {}
    images = _images_in_a_step(case)
    config = train_config(
        strategy=strategy,
        patch_size=case.masks.patch_size,
        masks_per_axis=case.masks.masks_per_axis,
        epochs=search.get("search_every") or 1,
        batch_size=images,
        lr=1e-4,
        **search,
    )
    with TemporaryDirectory() as folder:
        network, run = copy.deepcopy(case.network), Path(folder) / "run"
        compile = case.settings.compile
        train(network, case.spec, source, source, config, run, fabric=case.fabric, compile=compile)
        epochs = read_lines(run / EPOCHS)
    total = {key: sum(epoch[key] for epoch in epochs) for key in ("seconds", "forward_equivalents", "images")}
    return _Step(total["seconds"] * images / total["images"], total["forward_equivalents"] / total["images"])


def _images_in_a_step(case: Case) -> int:
    return min(case.train_batch_size, len(case.source))


def _without_empty_classes(source: Source) -> Source:
    """The source with its classes numbered anew, since training refuses classes without images."""
    present = sorted(set(source.labels))
    classes = tuple(source.classes[label] for label in present)
    return Source(classes, source.names, [present.index(label) for label in source.labels], source.open)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the progress of the training runs inside off the terminal."""
    before, stderr.quiet = stderr.quiet, True
    try:
        yield
    finally:
        stderr.quiet = before
