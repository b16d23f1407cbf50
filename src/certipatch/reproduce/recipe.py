"""Recipes: what a table of the paper is made of, as small TOML files (``recipes/*.toml``).

A recipe is a list of *setups*, each a data set with models, strategies, seeds, patches and masks per axis,
and the paper's numbers to compare with. ``plan.py`` makes runs out of it.
"""

from __future__ import annotations

import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from ..config import Frozen
from ..errors import ConfigError, brief
from ..geometry.masks import MaskSet
from ..geometry.patch import Size, parse_patch
from ..records.manifest import first_problem
from .comparison import Comparison

FOLDER = Path(__file__).with_name("recipes")
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
NAME = r"^[\w.-]+$"  # what can be part of the name of a folder
PATCHCLEANSER = "patchcleanser"
Where = tuple[str, str, str, str, str, int | None]  # defense, data, model, strategy, patch, masks per axis


class Base(Frozen):
    """How a network gets its weights where none can be fetched: it is trained on whole images first."""

    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    train_images: int = Field(ge=1)


class Setup(Frozen):
    """One data set, and what is trained and certified on it.

    Attributes:
        data: the name of the data set in folders, for ``--only`` and for ``--data``.
        location: what ``--data`` of ``train`` takes.
        train_images, test_images: how many are used, spread over the data set.
        weights: as ``--weights`` of ``train``. base: train a network here to begin with. Without both, a
            network begins with timm's weights.
        crop_pct: None: the weights' own.
        equal_compute: a pair (cheap, costly) adds a row, the cheap strategy with as many epochs as cost what
            the costly one does.
        places: certify by place too.
        optimizer ... keep: as in :class:`~certipatch.training.config.TrainConfig`.
    """

    data: str = Field(pattern=NAME)
    location: str
    train_split: str
    test_split: str
    train_images: int = Field(ge=1)
    test_images: int = Field(ge=1)
    models: tuple[Annotated[str, Field(pattern=NAME)], ...] = Field(min_length=1)
    weights: str | None = None
    base: Base | None = None
    image_size: int = Field(default=224, ge=1, le=10_000)
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    train_patch: str
    train_masks_per_axis: int = 6
    patches: tuple[str, ...] = Field(min_length=1)
    masks_per_axis: tuple[int, ...] = Field(min_length=1)
    places: bool = False
    strategies: tuple[str, ...] = Field(min_length=1)
    equal_compute: tuple[tuple[str, str], ...] = ()
    clean_fraction: float = 0.0
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    epochs: int = 10
    batch_size: int = 64
    lr: float | None = None
    optimizer: str | None = None
    schedule: str | None = None
    weight_decay: float = 0.0
    momentum: float = 0.9
    augment: str | None = None
    ema: float | None = None
    keep: str | None = None
    precision: str = "32-true"
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Setup:
        for name in ("models", "patches", "masks_per_axis", "strategies", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: the same value twice")
        if self.base and self.weights:
            raise ValueError("base and weights: only one of them")
        return self

    @property
    def size(self) -> Size:
        """(height, width) of the images in pixels of the tensor the model sees."""
        return (self.image_size, self.image_size)

    def masks(self, patch: str, masks_per_axis: int) -> MaskSet:
        """The masks against a patch as it is typed. Raises ConfigError for a patch or k that cannot be."""
        return MaskSet.covering(
            image_size=self.size, patch_size=parse_patch(patch, self.size), masks_per_axis=masks_per_axis
        )

    @property
    def train_masks(self) -> MaskSet:
        """The fine set of masks that is trained with."""
        return self.masks(self.train_patch, self.train_masks_per_axis)


class Published(Frozen):
    """A cell of the paper's tables, in %.

    Attributes:
        defense: PatchCleanser, or a comparator, which has no model, strategy or masks per axis in the paper.
        clean_accuracy: of the defended model; None where the table does not print it.
    """

    data: str
    patch: str
    defense: str = PATCHCLEANSER
    model: str = ""
    strategy: str = ""
    masks_per_axis: int | None = None
    clean_accuracy: float | None = None
    certified_robust_accuracy: float

    @property
    def cell(self) -> Where:
        """Where it stands: defense, data set, model, row of the table, patch and masks per axis."""
        return self.defense, self.data, self.model, self.strategy, self.patch, self.masks_per_axis

    def __str__(self) -> str:
        """``clean / certified robust`` as the paper prints it, or the latter alone."""
        clean = "" if self.clean_accuracy is None else f"{self.clean_accuracy:.1f} / "
        return f"{clean}{self.certified_robust_accuracy:.1f}"


class Recipe(Frozen):
    """A table or figure of the paper: the claim that it examines, its setups, and the paper's numbers.

    Attributes:
        comparison: in place of setups, certified defenses side by side.
        paper: the paper's numbers. paper_of: shipped recipes whose numbers are compared with too, so that
            each stands in one place.
        search_passes: the forward passes that the paper counts for the search of a strategy.
    """

    title: str
    claim: str
    figure: bool = False
    setup: tuple[Setup, ...] = ()
    comparison: Comparison | None = None
    paper: tuple[Published, ...] = ()
    paper_of: tuple[str, ...] = ()
    search_passes: dict[str, int] = Field(default={})

    @model_validator(mode="after")
    def _named_once(self) -> Recipe:
        if bool(self.setup) == bool(self.comparison):
            raise ValueError("expected setups or a comparison, found neither or both")
        names = [(setup.data, model) for setup in self.setup for model in setup.models]
        if len(set(names)) < len(names):
            raise ValueError("two setups of the same data and model; give the data another name")
        if len({value.cell for value in self.paper}) < len(self.paper):
            raise ValueError("paper: the same cell twice")
        return self

    @cached_property
    def published(self) -> dict[Where, Published]:
        """All numbers of the paper to compare with, by their cell. Raises ConfigError for no such recipe."""
        others = [value for name in self.paper_of for value in read_recipe(name).paper]
        return {value.cell: value for value in (*others, *self.paper)}


def read_recipe(name: str, *, precision: str | None = None) -> Recipe:
    """A recipe by the name of a shipped one (``table1`` ...) or from a TOML file.

    Args:
        precision: use this one instead of the recipe's.

    Raises ConfigError naming the first thing that is wrong.
    """
    path = FOLDER / f"{name}.toml" if name in NAMES else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"recipe {name!r}: expected one of {', '.join(NAMES)} or a .toml file, found neither"
        )
    recipe = _read(path)
    if precision is None:
        return recipe
    setups = tuple(setup.model_copy(update={"precision": precision}) for setup in recipe.setup)
    return recipe.model_copy(update={"setup": setups})


def _read(path: Path) -> Recipe:
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ConfigError(f"recipe {path}: {first_problem(error)}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError also for a number of 5,000 digits
        raise ConfigError(f"recipe {path}: not a TOML file that can be read ({brief(error, 120)})") from None
