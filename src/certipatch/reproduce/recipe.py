"""TODO."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from ..config import Frozen
from ..errors import ConfigError

FOLDER = Path(__file__).with_name("recipes")


NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


NAME = r"^[\w.-]+$"  # part of the name of a folder


class Base(Frozen):
    """How a network gets its weights where none can be fetched: trained on whole images first."""

    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    train_images: int = Field(ge=1)


class Setup(Frozen):
    """One data set and what is trained and certified on it.

    ``data`` names it in folders and for ``--only`` and ``--data``; ``location`` is what ``--data`` of
    ``train`` takes. ``train_images`` and ``test_images`` are those used, spread over the data set. A network
    begins with timm's weights, those of ``weights`` (as ``--weights`` of ``train``), or those of a ``base``
    trained here. A pair (cheap, costly) of
    ``equal_compute`` adds a row: the cheap strategy with as many epochs as cost what the costly one does.
    Without ``crop_pct`` the crop is the weights' own.
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
    strategies: tuple[str, ...] = Field(min_length=1)
    equal_compute: tuple[tuple[str, str], ...] = ()
    clean_fraction: float = 0.0
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    epochs: int = 10
    batch_size: int = 64
    lr: float | None = None
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


class Published(Frozen):
    """A value of the paper: certified robust accuracy in %."""

    data: str
    model: str
    strategy: str
    patch: str
    masks_per_axis: int
    certified_robust_accuracy: float


class Recipe(Frozen):
    title: str
    claim: str
    figure: bool = False
    setup: tuple[Setup, ...]
    paper: tuple[Published, ...] = ()

    @model_validator(mode="after")
    def _named_once(self) -> Recipe:
        names = [(setup.data, model) for setup in self.setup for model in setup.models]
        if len(set(names)) < len(names):
            raise ValueError("two setups of the same data and model; give the data another name")
        return self


def read_recipe(name: str, *, precision: str | None = None) -> Recipe:
    """A recipe by the name of a shipped one (``table1`` ...) or from a TOML file; with another precision if
    asked for.

    Raises ConfigError naming the first thing that is wrong.
    """
    path = FOLDER / f"{name}.toml" if name in NAMES else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"recipe {name!r}: expected one of {', '.join(NAMES)} or a .toml file, found neither"
        )
    try:
        recipe = Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"recipe {path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError also for a number of 5,000 digits
        raise ConfigError(
            f"recipe {path}: not a TOML file that can be read ({' '.join(str(error).split())[:120]})"
        ) from None
    if precision is None:
        return recipe
    return recipe.model_copy(
        update={"setup": tuple(setup.model_copy(update={"precision": precision}) for setup in recipe.setup)}
    )
