"""Recipes: what a table of the paper is made of, as small TOML files, and the runs that follow from one.

A recipe (``recipes/*.toml``) is a list of *setups*, each a data set with models, strategies, seeds, patches
and masks per axis. Every combination of model, strategy and seed is one :class:`Run`: a training and its
certifications. The folder of a run is named by what it is, so tables share runs; what a folder holds is
compared with what the run asks for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

from ..config import differences
from ..errors import ConfigError, RecordsError
from ..geometry.masks import MaskSet
from ..geometry.patch import Size, parse_patch
from ..records.manifest import read_manifest, read_manifests
from ..records.read import read_records
from ..training.config import TrainConfig, default_lr, train_config
from ..training.cost import STRATEGY_NAMES, copies, forward_equivalents
from .recipe import Recipe, Setup


def finished(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder if what it describes is finished, else None."""
    found = read_manifest(folder) if read_manifests(folder) else None
    return found if found and found["finished"] else None


@dataclass(frozen=True)
class Run:
    """One training with its certifications, at one scale."""

    setup: Setup
    arch: str
    strategy: str
    row: str
    epochs: int
    seed: int
    scale: float

    @property
    def place(self) -> str:
        """The folder of the data set and the model, for all strategies."""
        return f"{self.setup.data}-{self.arch}" + (f"-x{self.scale:g}" if self.scale != 1 else "")

    @property
    def slug(self) -> str:
        """The row as a word: in folder names and for ``--only``."""
        return self.row.replace(", ", "-").replace(" ", "-")

    @property
    def name(self) -> str:
        """The folder of this run, relative to ``--out``."""
        return f"{self.place}/{self.slug}-seed{self.seed}"

    @property
    def copies(self) -> int:
        return copies(self.strategy)

    @property
    def certifications(self) -> tuple[tuple[str, int], ...]:
        """(patch, masks per axis) of each certification."""
        return tuple((patch, k) for patch in self.setup.patches for k in self.setup.masks_per_axis)

    def certified(self, patch: str, masks_per_axis: int) -> str:
        """The folder of one certification, relative to ``--out``."""
        return f"{self.name}-certified/{self.masks(patch, masks_per_axis).name}"

    @property
    def image_size(self) -> Size:
        return (self.setup.image_size, self.setup.image_size)

    @property
    def train_images(self) -> int:
        return self.scaled(self.setup.train_images)

    @property
    def test_images(self) -> int:
        return self.scaled(self.setup.test_images)

    def scaled(self, images: int) -> int:
        return math.ceil(images * self.scale)

    def masks(self, patch: str, masks_per_axis: int) -> MaskSet:
        return MaskSet.covering(
            image_size=self.image_size,
            patch_size=parse_patch(patch, self.image_size),
            masks_per_axis=masks_per_axis,
        )

    @cached_property
    def config(self) -> TrainConfig:
        setup = self.setup
        return train_config(
            strategy=self.strategy,
            patch_size=parse_patch(setup.train_patch, self.image_size),
            masks_per_axis=setup.train_masks_per_axis,
            epochs=self.epochs,
            batch_size=setup.batch_size,
            lr=default_lr(self.arch) if setup.lr is None else setup.lr,
            clean_fraction=0.0 if self.strategy == "vanilla" else setup.clean_fraction,
            seed=self.seed,
        )

    def training(self, out: Path) -> dict[str, Any] | None:
        """The manifest of this run's training if it is finished in ``out``, else None.

        Raises RecordsError if the folder holds another training, or one that began from another base.
        """
        found = finished(out / self.name)
        if found is None:
            return None
        base = finished(out / self.place / "base") if self.setup.base else None
        start = {"initial_weights_sha256": base["finished"]["weights_sha256"]} if base else {}
        self._compare(
            out / self.name,
            found,
            images=self.train_images,
            train=self.config.model_dump(mode="json"),
            **start,
        )
        return found

    def certification(self, out: Path, patch: str, masks_per_axis: int) -> dict[str, Any] | None:
        """The manifest of one certification if there is one in ``out``, finished or not, else None.

        Raises RecordsError if the folder holds another certification, or one of other weights than this
        run's.
        """
        folder, training = out / self.certified(patch, masks_per_axis), self.training(out)
        if training is None or not read_manifests(folder):
            return None
        found, weights = read_manifest(folder), training["finished"]["weights_sha256"]
        geometry = json.loads(json.dumps(self.masks(patch, masks_per_axis).to_json()))
        self._compare(folder, found, images=self.test_images, masks=geometry, weights_sha256=weights)
        return found

    def _compare(self, folder: Path, manifest: dict[str, Any], *, images: int, **more: Any) -> None:
        model = {"arch": self.arch, "image_size": list(self.image_size)} | (
            {"crop_pct": c} if (c := self.setup.crop_pct) else {}
        )
        expected = {
            "model": model,
            "precision": self.setup.precision,
            "processes": 1,
            "data": {"images": images},
            **more,
        }
        there = {"processes": 1, **manifest["experiment"]}
        found = {
            key: {k: there[key].get(k) for k in value} if isinstance(value, dict) else there.get(key)
            for key, value in expected.items()
        }
        if differing := differences(found, expected):
            raise RecordsError(
                f"{folder}: holds another experiment than the recipe's ({'; '.join(differing[:3])}); choose "
                "another --out"
            )

    @property
    def train_passes(self) -> int:
        """Forward-equivalents of the training."""
        masks = self.masks(self.setup.train_patch, self.setup.train_masks_per_axis)
        return self.train_images * self.epochs * forward_equivalents(self.strategy, masks)

    def certify_passes(self, patch: str, masks_per_axis: int) -> int:
        """Forward passes of a certification at most; wrong pairs that are met early make it less."""
        n = len(self.masks(patch, masks_per_axis))
        return self.test_images * (1 + n * (n + 1) // 2)


def published(recipe: Recipe, run: Run, patch: str, masks_per_axis: int) -> float | None:
    """The paper's certified robust accuracy for a cell, in %, if it is known; None for rows that the paper
    does not have."""
    for value in recipe.paper:
        same = (value.data, value.model, value.strategy) == (
            run.setup.data,
            run.arch.partition(".")[0],
            run.row,
        )
        if same and (value.patch, value.masks_per_axis) == (patch, masks_per_axis):
            return value.certified_robust_accuracy
    return None


def plan(recipe: Recipe, *, only: str | None = None, scale: float = 1.0) -> list[Run]:
    """The runs of a recipe, seed by seed, so that every row of a table has its first result early.

    Args:
        only: patterns such as ``cifar10,resnet*,seed0,!grid-fine``; each must match the data, model, row or
            seed of a run (with ``!`` none of them).
        scale: share of the training and the test images.

    Raises ConfigError for a strategy, patch or k that cannot be, or if no run is left.
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"scale {scale:g}: expected a share of the images above 0 and at most 1")
    runs = [run for setup in recipe.setup for run in _runs(setup, scale)]
    patterns = [pattern.strip() for pattern in (only or "*").split(",")]

    def words(run: Run) -> tuple[str, ...]:
        return run.setup.data, run.arch, run.slug, f"seed{run.seed}"

    def wanted(run: Run) -> bool:
        return all(
            any(fnmatch(w, p.removeprefix("!")) for w in words(run)) != p.startswith("!") for p in patterns
        )

    chosen = [run for run in runs if wanted(run)]
    if not chosen:
        names = list(dict.fromkeys(word for run in runs for word in words(run)))
        raise ConfigError(f"--only {only!r}: no run matches all of it; there are {', '.join(names)}")
    return chosen


def _runs(setup: Setup, scale: float) -> Iterator[Run]:
    size = (setup.image_size, setup.image_size)
    masks = MaskSet.covering(
        image_size=size,
        patch_size=parse_patch(setup.train_patch, size),
        masks_per_axis=setup.train_masks_per_axis,
    )
    for strategy in (*setup.strategies, *chain.from_iterable(setup.equal_compute)):
        if strategy not in STRATEGY_NAMES:
            raise ConfigError(f"strategy {strategy!r}: expected one of {', '.join(STRATEGY_NAMES)}")
    for patch, k in product(setup.patches, setup.masks_per_axis):
        MaskSet.covering(image_size=size, patch_size=parse_patch(patch, size), masks_per_axis=k)
    rows = [(strategy, strategy, setup.epochs) for strategy in setup.strategies]
    for cheap, costly in setup.equal_compute:
        epochs = round(setup.epochs * forward_equivalents(costly, masks) / forward_equivalents(cheap, masks))
        rows.append((cheap, f"{cheap}, compute of {costly}", epochs))
    for seed in setup.seeds:
        for arch in setup.models:
            for strategy, row, epochs in rows:
                run = Run(setup, arch, strategy, row, epochs, seed, scale)
                run.config  # noqa: B018, validated now and not when it is its turn
                yield run


def _trained(run: Run, out: Path) -> bool:
    return run.training(out) is not None


def _certified(run: Run, out: Path, patch: str, masks_per_axis: int) -> bool:
    found = run.certification(out, patch, masks_per_axis)
    return (
        found is not None and len(read_records(out / run.certified(patch, masks_per_axis))) == run.test_images
    )


def _done(run: Run, out: Path) -> bool:
    return _trained(run, out) and all(_certified(run, out, *c) for c in run.certifications)
