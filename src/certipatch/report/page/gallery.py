"""Which images a page shows, and their pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ...config import DataAsked
from ...errors import CertiPatchError
from ...records.schema import Record
from ..findings import failing_pair, failing_pairs, telling
from ..images import images_of, pictures
from .shown import PAIRS, Shown

if TYPE_CHECKING:
    from ...data.source import Images

PICTURES = 180  # at most in galleries, in all: with 224 pixels a side a page of some 3 megabytes
ROOM = 1_500_000  # characters for further pictures of images without a certificate
EACH = 8  # of an outcome in a gallery


class Pictures:
    """The pictures of a page, by the hash of their pixels.

    Args:
        data: where the images are; None: as the manifests say. Where they are said to be they must be, else a
            note says why there are no pictures.
    """

    def __init__(self, data: DataAsked | None) -> None:
        self.data = data
        self.found: dict[str, str] = {}
        self.notes: list[str] = []
        self._opened: dict[str, Images | CertiPatchError] = {}

    def add(self, run: Shown, records: Iterable[Record]) -> None:
        """Find the pictures of some records of a run, as far as they are not there."""
        images = self._images_of(run)
        if not isinstance(images, CertiPatchError):
            self.found |= pictures(images, [record for record in records if record.pixels not in self.found])

    def fill(self, run: Shown, room: int) -> None:
        """Find more pictures of images without a certificate, up to so many characters."""
        for record in run.records:
            if room > 0 and not record.certified and record.pixels not in self.found:
                before = sum(map(len, self.found.values()))
                self.add(run, [record])
                room -= sum(map(len, self.found.values())) - before

    def _images_of(self, run: Shown) -> Images | CertiPatchError:
        key = json.dumps([run.manifest.stated["data"], run.manifest.stated["model"]])
        if key not in self._opened:
            try:
                self._opened[key] = images_of(run.manifest, self.data)
            except CertiPatchError as error:
                if self.data is not None and self.data.place:
                    raise
                self._opened[key] = error
                self.notes.append(
                    f"pictures of {run.summary.name}: not shown ({error}); give its --data, --split and "
                    "--class-map"
                )
        return self._opened[key]


def choose(runs: Sequence[Shown], attacked: set[int], found: Pictures) -> list[list[Record]]:
    """The records that the gallery of each run shows; their pictures and those of further examples are found.

    Args:
        attacked: the indices of images that are shown beside their patched ones.
    """
    each = max(2, min(EACH, PICTURES // (3 * max(1, len(runs)))))
    galleries = []
    for run in runs:
        groups = telling(run.records, each, run.summary.min_margin)
        gallery = list({record.index: record for group in groups.values() for record in group}.values())
        galleries.append(gallery)
        under_attack = [record for record in run.records if record.index in attacked]
        found.add(run, [*gallery, *_examples(run, {record.index for record in gallery}), *under_attack])
        if run is runs[0]:
            found.fill(run, ROOM)
    return galleries


def _examples(run: Shown, shown: set[int]) -> Iterable[Record]:
    """An image for each of the most frequent failing pairs of masks that no shown image is an example of."""
    for pair, _ in failing_pairs(run.records)[:PAIRS]:
        failing = [record for record in run.records if failing_pair(record) == pair]
        if not any(record.index in shown for record in failing):
            shown.add(failing[0].index)
            yield failing[0]
