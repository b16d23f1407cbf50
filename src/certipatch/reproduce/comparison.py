"""A recipe that sets certified defenses side by side: one data set, one geometry, one budget for all."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from ..config import Frozen


class Row(Frozen):
    """A certified defense with the network that is trained for it.

    Attributes:
        name: of the row, and of its folder; the name that the paper's numbers are under.
        defense, options: as of ``certify --defense``, with its own options.
        choose: options with the values to choose from, by what is certified of held-out training images.
        masks_per_axis: k; a defense without masks does not look at it.
        model: the network, trained here from random weights.
        train: of the training configuration what differs from vanilla (strategy, loss, windows, lr ...).
        whole: the share of the epochs that goes before on whole images, with cross-entropy.
        trained_as: the row whose network this one takes, in place of one of its own.
    """

    name: str = Field(pattern=r"^[\w-]+$")
    defense: str
    options: dict[str, Any] = Field(default={})
    choose: dict[str, tuple[Any, ...]] = Field(default={})
    masks_per_axis: int = Field(default=6, ge=1)
    model: str
    train: dict[str, Any] = Field(default={})
    whole: float = Field(default=0.5, ge=0, lt=1)
    trained_as: str | None = None


class Comparison(Frozen):
    """What all rows have in common.

    Attributes:
        held_out_images: training images that are not trained on, to choose options by.
        gflop: the budget of a training for one image over all epochs, in 10^9 operations (2 a multiply-add, a
            backward pass as two forward ones): from it follow the epochs of each row.
        train_patch, patches: what is trained for, and certified against.
    """

    data: str = Field(pattern=r"^[\w.-]+$")
    location: str
    train_split: str
    test_split: str
    train_images: int = Field(ge=1)
    held_out_images: int = Field(ge=1)
    test_images: int = Field(ge=1)
    image_size: int = Field(ge=1, le=10_000)
    train_patch: str
    patches: tuple[str, ...] = Field(min_length=1)
    published: dict[str, str] = Field(default={})  # a patch here -> the same patch in the paper's table
    gflop: float = Field(gt=0)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=0.05, gt=0)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    note: str = ""

    @model_validator(mode="after")
    def _named(self) -> Comparison:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError("rows: the same name twice")
        for row in self.rows:
            if row.trained_as is not None and row.trained_as not in names[: names.index(row.name)]:
                raise ValueError(f"trained_as {row.trained_as!r}: expected a row above {row.name}")
        return self

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)
