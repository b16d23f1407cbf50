"""A certification as a page shows it, under a short name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...data.words import in_words
from ...errors import RecordsError
from ...records.experiment import Certification
from ...records.manifest import Manifest
from ...records.schema import Record
from ..certification import Summary
from ..findings import cuts, failing_pair
from ..places import ByPlace

PAIRS = 10  # of the most frequent failing ones
MOST_CELLS = 2**17  # into which the sides of all masks may cut the image


@dataclass(frozen=True)
class Shown:
    """A certification and what it is called on the page.

    Raises RecordsError for a failing pair of masks that there are not, and for masks at more places than
    those of any defense are.
    """

    summary: Summary
    name: str
    words: Mapping[str, str] | None = None  # of classes, by the folder's name

    def __post_init__(self) -> None:
        rows, columns = cuts(self.windows, self.experiment.against.image_size)
        if len(rows) * len(columns) > MOST_CELLS:
            raise RecordsError(
                f"{self.summary.name}: expected masks in rows and columns, found some that cut the image "
                f"into {len(rows)} by {len(columns)} parts; restore its manifest or certify again"
            )
        for record in self.records:
            pair = failing_pair(record)
            if pair is not None and not all(0 <= mask < len(self.windows) for mask in pair):
                raise RecordsError(
                    f"{self.summary.name}: image {record.index}: expected a pair of its {len(self.windows)} "
                    f"masks, found {pair}"
                )

    @property
    def manifest(self) -> Manifest:
        """What was run."""
        return self.summary.folder.manifest

    @property
    def experiment(self) -> Certification:
        """Everything that can change a result."""
        return self.summary.experiment

    @property
    def records(self) -> Sequence[Record]:
        """The records in the order of their index."""
        return self.summary.folder.records

    @cached_property
    def class_names(self) -> list[str]:
        """The classes as people read them."""
        return in_words(self.experiment.model.class_names, self.words)

    @cached_property
    def by_place(self) -> ByPlace | None:
        """What is proven of each image by place; None unless it was certified so."""
        return ByPlace.of(self.summary.folder, min_margin=self.summary.min_margin)

    @property
    def windows(self) -> list[list[list[int]]]:
        """The windows of each mask as [top, left, height, width]; none for a defense without masks."""
        return self.experiment.windows
