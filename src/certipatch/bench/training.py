"""TODO."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..data.source import Source
from ..records.read import read_lines
from ..training.config import train_config
from ..training.cost import SEARCHES_BY_LOSS
from ..training.train import train
from .case import Case
from .rounds import _quiet, _quotients, row


def training_steps(case: Case) -> dict[str, Any]:
    """Seconds of a step (masking with its search, forward, backward, update) in epochs that ``train`` itself
    runs."""
    n, old = min(case.train_batch_size, len(case.source)), case.source
    present = sorted(
        set(old.labels)
    )  # numbered anew: training refuses classes without images, which cost no time
    source = Source(
        tuple(old.classes[c] for c in present), old.names, [present.index(c) for c in old.labels], old.open
    )
    masks = {"patch_size": case.masks.patch_size, "masks_per_axis": case.masks.masks_per_axis}

    def epoch(strategy: str) -> tuple[float, float]:
        search = case.search if strategy in SEARCHES_BY_LOSS else {}
        epochs = search.get("search_every") or 1
        config = train_config(strategy=strategy, **masks, epochs=epochs, batch_size=n, lr=1e-4, **search)
        with TemporaryDirectory() as folder:
            network, run = copy.deepcopy(case.network), Path(folder) / "run"
            compile = case.settings.compile
            train(network, case.spec, source, source, config, run, fabric=case.fabric, compile=compile)
            lines = read_lines(run / "epochs.jsonl")
        seconds, passes, images = (
            sum(line[key] for line in lines) for key in ("seconds", "forward_equivalents", "images")
        )
        return seconds * n / images, passes / images

    names = list(dict.fromkeys(["vanilla", *case.strategies]))
    with _quiet():
        rounds = [[epoch(name) for name in names] for _ in range(case.repeats + 1)][1:]  # the first warms up
    seconds = [[found[i][0] for found in rounds] for i in range(len(names))]
    passes = [rounds[0][i][1] for i in range(len(names))]
    return {
        "rows": [
            row(name, "s/step", seconds[i], passes[i], _quotients(seconds[i], seconds[0]))
            for i, name in enumerate(names)
        ],
        "batch_size": n,
        "notes": [
            f"{n} images in a step, {case.settings.precision}; passes: forward passes' worth of search and "
            "gradient step",
            *(f"{name.replace('_', ' ')}: {value}" for name, value in case.search.items()),
        ],
    }
