"""What ``verify`` has to know of a defense to check its records: the values that a restatement is made of.

Each defense is restated in a file of its own (``patchcleanser``, ``minority_reports``), which uses nothing of
the code it checks and has a row in ``methods``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .findings import Experiment, Record, Verification

# What every experiment has, whatever the defense.
ENTRIES = frozenset({"model", "weights_sha256", "trained", "data", "device", "precision", "block"})

# What every line of ``certify`` has, whatever the defense.
FIELDS = frozenset(
    {"index", "name", "label", "pixels", "vanilla_label", "defended_label"}
    | {"certified", "margin", "passes", "error"}
)


@dataclass(frozen=True)
class Line:
    """One line of the records, what its fields are measured against, and where findings about it go."""

    where: str
    record: Record
    experiment: Experiment
    found: Verification

    @property
    def classes(self) -> int:
        """How many classes the model has."""
        return self.experiment["model"]["num_classes"]

    @property
    def masks(self) -> int:
        """How many masks the defense has."""
        return len(self.experiment["masks"]["windows"])

    def is_class(self, value: object) -> bool:
        """Whether a value is a label that the model can answer."""
        return type(value) is int and 0 <= value < self.classes

    def expect(self, holds: bool, what: str) -> None:
        """Note as a finding what does not hold."""
        if not holds:
            self.found.add(self.where, what)


@dataclass(frozen=True)
class Sighting:
    """One image that is looked at again, beside its record.

    Attributes:
        image: (3, H, W) float32 in [0, 1], as the model sees it.
        logits: (3, H, W) view of the image -> (classes,) logits.
        network: what they come from.
        tolerance: two margins that differ by less may differ by rounding only.
        differences: what differs from the record, and whether it does so surely or by rounding only.
    """

    record: Record
    experiment: Experiment
    image: Tensor
    logits: Callable[[Tensor], np.ndarray]
    tolerance: float
    network: nn.Module
    differences: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def masks(self) -> int:
        """How many masks the defense has."""
        return len(self.experiment["masks"]["windows"])

    def under(self, *masks: int) -> np.ndarray:
        """The logits (classes,) of the image with the pixels of these masks replaced by the fill colour."""
        view = self.image.clone()
        fill = torch.tensor(self.experiment["fill"], dtype=torch.float32).reshape(3, 1, 1)
        for mask in masks:
            for top, left, height, width in self.experiment["masks"]["windows"][mask]:
                view[:, top : top + height, left : left + width] = fill
        return self.logits(view)

    def differs(self, what: str, *, surely: bool) -> None:
        """Note a difference; if it is not there ``surely``, rounding in another batch can be its cause."""
        self.differences.append((what, surely))


def no_flaws(experiment: Experiment) -> Iterator[str]:
    """Nothing to find: the experiment has no entries of the defense's own that could be wrong."""
    return iter(())


def flag(record: Record) -> bool:
    """Whether a line of ``certify`` says that its image is certified."""
    return record["certified"] is True


@dataclass(frozen=True)
class Restatement:
    """One defense, as ``verify`` knows it.

    Attributes:
        defense: its name in the experiment's entry ``defense``.
        entries: what its experiments must have.
        optional: what its experiments may have besides.
        fields: what its lines must have.
        optional_fields: what its lines may have besides.
        further: whether experiments and lines may have entries and fields that are not named here.
        check_line: expects what follows from what within one line about an image that could be read.
        is_certified: whether a line says that its image is certified.
        counted: what the number of such lines is of, in words.
        flaws: what is wrong with the entries of the experiment that are the defense's own.
        compare: compares a record with views of its image. None if the defense is not restated.
    """

    defense: str
    entries: frozenset[str]
    fields: frozenset[str]
    check_line: Callable[[Line], None]
    compare: Callable[[Sighting], None] | None
    optional: frozenset[str] = frozenset({"defense"})
    optional_fields: frozenset[str] = frozenset()
    further: bool = False
    is_certified: Callable[[Record], bool] = flag
    counted: str = "certified"
    flaws: Callable[[Experiment], Iterator[str]] = no_flaws

    def odd_entries(self, experiment: Experiment) -> list[str]:
        """The entries that an experiment lacks, and those that it should not have."""
        return self._odd(set(experiment) - self.optional, self.entries)

    def odd_fields(self, record: Record) -> list[str]:
        """The fields that a line lacks, and those that it should not have."""
        return self._odd(set(record) - self.optional_fields, self.fields)

    def _odd(self, found: set[str], expected: frozenset[str]) -> list[str]:
        return sorted(expected - found if self.further else expected ^ found)
