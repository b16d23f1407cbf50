"""What the records of a certification say beyond its three shares.

Where the model fails, on which classes, and which images are worth a look.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np

from ..geometry.masks import MaskPair
from ..records.schema import PatchCleanserRecord, Record
from .certification import accuracies
from .shares import Share

Outcome = Literal["certified", "just missed", "hopeless", "unreadable"]
Rectangle = Sequence[int]  # top, left, height, width, as manifests have them


def outcome(record: Record, min_margin: float = 0.0) -> Outcome:
    """One word for an image.

    *Just missed*: every single mask leaves the right answer, and only some pair of masks a wrong one (or the
    certificate's margin is below ``min_margin``). *Hopeless*: a single mask is enough for a wrong answer, or
    none at all. Of a defense without masks an image just misses if the defended answer is right.
    """
    if record.error is not None:
        return "unreadable"
    if record.counts(min_margin):
        return "certified"
    right = record.defended_label == record.label
    agreed = not isinstance(record, PatchCleanserRecord) or record.case == "agreed"
    return "just missed" if right and agreed else "hopeless"


def failing_pair(record: Record) -> MaskPair | None:
    """The pair of masks under which the image failed first, if it is known."""
    return record.failing_pair if isinstance(record, PatchCleanserRecord) else None


def failing_label(record: Record) -> int | None:
    """What the model answered under that pair."""
    return record.failing_label if isinstance(record, PatchCleanserRecord) else None


def failing_pairs(records: Iterable[Record]) -> list[tuple[MaskPair, int]]:
    """How often each pair of masks is the recorded failing one; the most frequent first.

    An image that is wrong without any mask is not counted: no mask is to blame.
    """
    right = (record for record in records if record.vanilla_label == record.label)
    counts = Counter(pair for pair in map(failing_pair, right) if pair is not None)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


@dataclass(frozen=True)
class Heat:
    """The image plane, cut along the sides of all masks.

    Attributes:
        rows, columns: where the cuts are, in pixels, from 0 to the image's side.
        counts: (rows - 1, columns - 1), for each cell the images whose failing pair hides it.
    """

    rows: list[int]
    columns: list[int]
    counts: np.ndarray


def heat(
    pairs: Iterable[tuple[MaskPair, int]], masks: Sequence[Sequence[Rectangle]], image_size: Sequence[int]
) -> Heat:
    """Which parts of the image are hidden when the model fails."""
    rows, columns = cuts(masks, image_size)
    counts = np.zeros((len(rows) - 1, len(columns) - 1), dtype=int)
    for (i, j), n in pairs:
        hidden = np.zeros(counts.shape, dtype=bool)
        for top, left, height, width in [*masks[i], *masks[j]]:
            across = slice(columns.index(left), columns.index(left + width))
            hidden[rows.index(top) : rows.index(top + height), across] = True
        counts += n * hidden
    return Heat(rows, columns, counts)


def cuts(masks: Sequence[Sequence[Rectangle]], image_size: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where the sides of the masks cut the rows and the columns of the image."""
    rows = _cuts(image_size[0], ((top, height) for mask in masks for top, _, height, _ in mask))
    columns = _cuts(image_size[1], ((left, width) for mask in masks for _, left, _, width in mask))
    return rows, columns


def _cuts(side: int, stretches: Iterable[tuple[int, int]]) -> list[int]:
    """Where an axis is cut: at both ends, and at both ends of each (start, length)."""
    return sorted({0, side, *(end for start, length in stretches for end in (start, start + length))})


@dataclass(frozen=True)
class OfClass:
    """The images of one class.

    Attributes:
        wrong: what the failing views answer most often in its place, with counts.
        others: how many images they answer something else on.
    """

    label: int
    vanilla_accuracy: Share
    clean_accuracy: Share
    certified_robust_accuracy: Share
    wrong: tuple[tuple[int, int], ...]
    others: int

    @property
    def _hardness(self) -> tuple[float, int, int]:
        share = self.certified_robust_accuracy
        return share.part, -share.images, self.label


def of_classes(records: Sequence[Record], min_margin: float = 0.0) -> list[OfClass]:
    """Each class that has images, the hardest first: the least certified, of equals the one with more
    images."""
    images: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        images[record.label].append(record)
    found = [_of_class(label, group, min_margin) for label, group in images.items()]
    return sorted(found, key=lambda one: one._hardness)


def _of_class(label: int, group: Sequence[Record], min_margin: float) -> OfClass:
    wrong = Counter(answer for answer in map(failing_label, group) if answer is not None)
    common = tuple(wrong.most_common(3))
    others = wrong.total() - sum(n for _, n in common)
    return OfClass(label, **accuracies(group, min_margin=min_margin), wrong=common, others=others)


def telling(records: Iterable[Record], each: int, min_margin: float = 0.0) -> dict[Outcome, list[Record]]:
    """Up to ``each`` images of every outcome to look at.

    Certified: those with the smallest margins, which are nearest to failing. Just missed: those for which a
    wrong pair was found last. Hopeless: one of each class, where there are so many.
    """
    groups: dict[Outcome, list[Record]] = {"certified": [], "just missed": [], "hopeless": []}
    for record in records:
        groups.setdefault(outcome(record, min_margin), []).append(record)
    groups.pop("unreadable", None)  # there is nothing to see
    groups["certified"].sort(key=lambda record: record.margin or 0.0)
    groups["just missed"].sort(key=lambda record: -record.passes)
    groups["hopeless"] = _spread(groups["hopeless"])
    return {name: group[:each] for name, group in groups.items()}


def _spread(records: list[Record]) -> list[Record]:
    """The records in such an order that each class has its turn."""
    classes: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        classes[record.label].append(record)
    return [record for turn in zip_longest(*classes.values()) for record in turn if record is not None]
