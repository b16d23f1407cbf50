"""Certificates by place: the mean share of places where a patch can do nothing, and the maps of them.

This is another promise than certified robust accuracy: it is kept where the attacker does not choose the
place. The theorem is that of ``proven_rows`` in ``defenses/patchcleanser/algorithms.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np

from ..errors import RecordsError
from ..geometry.patch import Threat, Window
from ..geometry.places import Places
from ..records.experiment import Certification
from ..records.read import Folder
from ..records.schema import PatchCleanserRecord, Record
from .shares import Share

RESAMPLES = 2000  # of the images, for the interval


@dataclass(frozen=True)
class ShareOfPlaces:
    """The mean over images of the share of places that are proven; no share of images.

    Attributes:
        part: the mean, from 0 to 1.
        interval: a 95 % bootstrap interval over the images; of images that are all alike, which a bootstrap
            cannot tell apart, the Wilson interval of as many images.
        images: how many images there are.
        everywhere, somewhere: how many of them are proven at every place, and at one at least.
    """

    part: float
    interval: tuple[float, float]
    images: int
    everywhere: int
    somewhere: int

    @classmethod
    def of(cls, shares: np.ndarray) -> ShareOfPlaces:
        """From the share of each image, (images,) from 0 to 1."""
        n, (values, counts) = len(shares), np.unique(shares, return_counts=True)
        if len(values) == 1:
            whole = n * values[0]
            interval = Share(floor(whole), n).interval[0], Share(ceil(whole), n).interval[1]
        else:
            drawn = np.random.default_rng(0).multinomial(n, counts / n, size=RESAMPLES) @ values / n
            low, high = np.quantile(drawn, (0.025, 0.975))
            interval = float(low), float(high)
        return cls(float(shares.mean()), interval, n, int((shares == 1).sum()), int((shares > 0).sum()))

    @property
    def percent(self) -> float:
        """The mean in %."""
        return 100 * self.part

    @property
    def _percents(self) -> str:
        low, high = self.interval
        return f"{100 * low:.1f}-{100 * high:.1f}"

    def __str__(self) -> str:
        return f"{self.percent:.1f} % of places ({self._percents})"

    def stacked(self) -> str:
        """Three short lines, for a column of a table."""
        return f"{self.percent:.1f} %\nof places\n{self._percents}"

    def to_json(self) -> dict[str, Any]:
        """``share``, ``interval_95``, ``images``, ``everywhere`` and ``somewhere``."""
        return {
            "share": self.part,
            "interval_95": self.interval,
            "images": self.images,
            "everywhere": self.everywhere,
            "somewhere": self.somewhere,
        }


@dataclass(frozen=True)
class ByPlace:
    """What the records of a certification by place say of each image.

    Attributes:
        places: the places of the patch, by the masks that hide it there.
        rows: (images, masks) bool: the rows that are proven.
    """

    places: Places
    rows: np.ndarray

    @classmethod
    def of(cls, folder: Folder[Record], *, min_margin: float = 0.0) -> ByPlace | None:
        """None of a folder that was not certified by place.

        Args:
            min_margin: count only rows whose smallest logit margin is at least this.

        Raises RecordsError for a record of other masks than those of the run.
        """
        experiment = folder.manifest.certification
        if not experiment.places:
            return None
        rows = np.zeros((len(folder.records), len(experiment.windows)), dtype=bool)
        for row, record in zip(rows, folder.records, strict=True):
            proven, margins = _proven(record)
            if proven is None:
                continue
            if len(proven) != len(row):
                raise RecordsError(
                    f"{folder.path}: image {record.index}: expected proven to be of its {len(row)} masks, "
                    f"found {len(proven)}"
                )
            held = np.array([bit == "1" for bit in proven])
            row[np.flatnonzero(held)] = np.array(margins) >= min_margin
        return cls(places_of(experiment), rows)

    def shares(self) -> np.ndarray:
        """(images,) float64: the share of places that are proven for each image."""
        found: dict[bytes, float] = {}
        for row in self.rows:
            if row.tobytes() not in found:
                found[row.tobytes()] = self.places.share(row)
        return np.array([found[row.tobytes()] for row in self.rows])

    def mean(self) -> np.ndarray:
        """(kinds,) float64, of one patch: the share of images that are proven at places of each kind."""
        proven = self.rows.astype(np.float32) @ self.places.hidden.T.astype(np.float32) > 0
        share: np.ndarray = proven.mean(axis=0)
        return share


def _proven(record: Record) -> tuple[str | None, tuple[float, ...]]:
    if not isinstance(record, PatchCleanserRecord) or record.proven is None:
        return None, ()
    return record.proven, record.proven_margins or ()


def places_of(experiment: Certification) -> Places:
    """The places of the patch that a certification is against, under its masks."""
    windows = [tuple(Window(*window) for window in mask) for mask in experiment.windows]
    height, width = experiment.against.image_size
    stated = experiment.against.model_dump(include={"patch_size", "other_patch_sizes", "patches"})
    return Places.of(windows, (height, width), Threat.of(stated))
