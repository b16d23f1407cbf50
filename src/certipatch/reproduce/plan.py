"""The runs that follow from a recipe, at a share of its images.

Every combination of model, strategy and seed is one :class:`Run`: a training and its certifications. The
folder of a run is named by what it is, so tables share runs; ``done.py`` compares what a folder holds with
what the run asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import chain, product

from ..errors import ConfigError
from ..geometry.masks import MaskSet
from ..training.config import TrainConfig, default_lr, train_config
from ..training.strategies import BACKWARD, FORWARD, STRATEGIES, forward_equivalents
from .recipe import PATCHCLEANSER, Published, Recipe, Setup

# Options of a training that a setup may set, besides those that decide on the rows of its table.
TRAINED = ("optimizer", "schedule", "weight_decay", "momentum", "augment", "ema", "keep")


@dataclass(frozen=True)
class Run:
    """One training with its certifications, at one scale.

    Attributes:
        row: what it is called in the table: its strategy, or the strategy and whose compute it has.
        scale: the share of the setup's images that is used.
    """

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
    def words(self) -> tuple[str, ...]:
        """What ``--only`` can ask for."""
        return self.setup.data, self.arch, self.slug, f"seed{self.seed}"

    @property
    def name(self) -> str:
        """The folder of this run, relative to ``--out``."""
        return f"{self.place}/{self.slug}-seed{self.seed}"

    @property
    def base(self) -> str:
        """The folder of the network that all runs of this place begin with, if the setup has one."""
        return f"{self.place}/base"

    @property
    def certifications(self) -> tuple[tuple[str, int], ...]:
        """(patch, masks per axis) of each certification."""
        return tuple(product(self.setup.patches, self.setup.masks_per_axis))

    def certified(self, patch: str, masks_per_axis: int) -> str:
        """The folder of one certification, relative to ``--out``."""
        return f"{self.name}-certified/{self.masks(patch, masks_per_axis).name}"

    def masks(self, patch: str, masks_per_axis: int) -> MaskSet:
        """The masks of one certification."""
        return self.setup.masks(patch, masks_per_axis)

    def scaled(self, images: int) -> int:
        """How many of so many images are used at this scale; at least one."""
        return math.ceil(images * self.scale)

    @property
    def train_images(self) -> int:
        """How many images are trained on."""
        return self.scaled(self.setup.train_images)

    @property
    def test_images(self) -> int:
        """How many images are certified."""
        return self.scaled(self.setup.test_images)

    @property
    def copies(self) -> int:
        """Masked copies of each image in a gradient step."""
        return STRATEGIES[self.strategy].copies

    @cached_property
    def config(self) -> TrainConfig:
        """The recipe of the training. Raises ConfigError for a value that cannot be."""
        setup = self.setup
        return train_config(
            strategy=self.strategy,
            patch_size=setup.train_masks.patch_size,
            masks_per_axis=setup.train_masks_per_axis,
            epochs=self.epochs,
            batch_size=setup.batch_size,
            lr=default_lr(self.arch, setup.optimizer) if setup.lr is None else setup.lr,
            **{name: getattr(setup, name) for name in TRAINED},
            clean_fraction=0.0 if self.strategy == "vanilla" else setup.clean_fraction,
            seed=self.seed,
        )

    @property
    def train_passes(self) -> int:
        """Forward-equivalents of the training."""
        return self.train_images * self.epochs * forward_equivalents(self.strategy, self.setup.train_masks)

    @property
    def base_passes(self) -> int:
        """Forward-equivalents of training the network that the runs begin with; 0 without one."""
        base = self.setup.base
        return self.scaled(base.train_images) * base.epochs * (FORWARD + BACKWARD) if base else 0

    def certify_passes(self, patch: str, masks_per_axis: int) -> int:
        """Forward passes of a certification at most; wrong pairs that are met early make it less."""
        n = len(self.masks(patch, masks_per_axis))
        return self.test_images * (1 + n * (n + 1) // 2)


def published(recipe: Recipe, run: Run, patch: str, masks_per_axis: int) -> Published | None:
    """What the paper prints in a cell; None for rows that it does not have."""
    model = run.arch.partition(".")[0]
    return recipe.published.get((PATCHCLEANSER, run.setup.data, model, run.row, patch, masks_per_axis))


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
    chosen = [run for run in runs if _matches_all(patterns, run.words)]
    if not chosen:
        names = dict.fromkeys(word for run in runs for word in run.words)
        raise ConfigError(f"--only {only!r}: no run matches all of it; there are {', '.join(names)}")
    return chosen


def _matches_all(patterns: list[str], words: tuple[str, ...]) -> bool:
    """Whether each pattern matches one of the words, or with ``!`` none of them."""

    def matches(pattern: str) -> bool:
        found = any(fnmatch(word, pattern.removeprefix("!")) for word in words)
        return found != pattern.startswith("!")

    return all(map(matches, patterns))


def _runs(setup: Setup, scale: float) -> Iterator[Run]:
    _check(setup)
    for seed, arch, (strategy, row, epochs) in product(setup.seeds, setup.models, _rows(setup)):
        run = Run(setup, arch, strategy, row, epochs, seed, scale)
        run.config  # noqa: B018, validated now and not when it is its turn
        yield run


def _check(setup: Setup) -> None:
    """Raise ConfigError for a strategy, patch or k that cannot be."""
    setup.train_masks  # noqa: B018, raises for what it cannot cover
    for strategy in (*setup.strategies, *chain.from_iterable(setup.equal_compute)):
        if strategy not in STRATEGIES:
            raise ConfigError(f"strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}")
    for patch, k in product(setup.patches, setup.masks_per_axis):
        setup.masks(patch, k)


def _rows(setup: Setup) -> list[tuple[str, str, int]]:
    """(strategy, row, epochs) of each row of the setup's table."""

    def cost(strategy: str) -> int:
        return forward_equivalents(strategy, setup.train_masks)

    rows = [(strategy, strategy, setup.epochs) for strategy in setup.strategies]
    for cheap, costly in setup.equal_compute:
        epochs = round(setup.epochs * cost(costly) / cost(cheap))
        rows.append((cheap, f"{cheap}, compute of {costly}", epochs))
    return rows
