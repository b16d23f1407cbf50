"""What the records of a certification say beyond its three shares: where it fails, on which classes, and on
which images to look."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np

from ..records.schema import Record
from .certification import Share

Outcome = Literal["certified", "just missed", "hopeless", "unreadable"]


Pair = tuple[int, int]


Rectangle = Sequence[int]  # top, left, height, width, as manifests have them


def outcome(record: Record, min_margin: float = 0.0) -> Outcome:
    """One word for an image.

    *Just missed*: every single mask leaves the right answer, and only some pair of masks a wrong one (or the
    certificate's margin is below ``min_margin``). *Hopeless*: a single mask is enough for a wrong answer, or
    none at all.
    """
    if record.error is not None:
        return "unreadable"
    if record.certified and (record.margin or 0.0) >= min_margin:
        return "certified"
    return "just missed" if record.case == "agreed" and record.defended_label == record.label else "hopeless"


def failing_pairs(records: Iterable[Record]) -> list[tuple[Pair, int]]:
    """How often each pair of masks (i <= j; i = j: a single mask) is the recorded failing one; the most
    frequent first.

    An image that is wrong without any mask is not counted: no mask is to blame.
    """
    counts = Counter(
        record.failing_pair
        for record in records
        if record.failing_pair is not None and record.vanilla_label == record.label
    )
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
    pairs: Iterable[tuple[Pair, int]], masks: Sequence[Sequence[Rectangle]], image_size: Sequence[int]
) -> Heat:
    """Which parts of the image are hidden when the model fails."""
    every = [rectangle for mask in masks for rectangle in mask]
    rows = sorted({0, image_size[0], *(side for top, _, height, _ in every for side in (top, top + height))})
    columns = sorted(
        {0, image_size[1], *(side for _, left, _, width in every for side in (left, left + width))}
    )
    counts = np.zeros((len(rows) - 1, len(columns) - 1), dtype=int)
    for (i, j), n in pairs:
        hidden = np.zeros(counts.shape, dtype=bool)
        for top, left, height, width in [*masks[i], *masks[j]]:
            hidden[
                rows.index(top) : rows.index(top + height), columns.index(left) : columns.index(left + width)
            ] = True
        counts += n * hidden
    return Heat(rows, columns, counts)


@dataclass(frozen=True)
class OfClass:
    """The images of one class. ``wrong``: what the failing views answer most often in its place, with counts;
    ``others``: how many images they answer something else on."""

    label: int
    vanilla_accuracy: Share
    clean_accuracy: Share
    certified_robust_accuracy: Share
    wrong: tuple[tuple[int, int], ...]
    others: int


def of_classes(records: Sequence[Record], min_margin: float = 0.0) -> list[OfClass]:
    """Each class that has images, the hardest first: the least certified, of equals the one with more
    images."""
    images: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        images[record.label].append(record)
    found = []
    for label, group in images.items():
        n = len(group)
        wrong = Counter(record.failing_label for record in group if record.failing_label is not None)
        found.append(
            OfClass(
                label,
                Share(sum(record.vanilla_label == label for record in group), n),
                Share(sum(record.defended_label == label for record in group), n),
                Share(sum(outcome(record, min_margin) == "certified" for record in group), n),
                tuple(wrong.most_common(3)),
                wrong.total() - sum(n for _, n in wrong.most_common(3)),
            )
        )
    return sorted(
        found,
        key=lambda one: (
            _part(one.certified_robust_accuracy),
            -one.certified_robust_accuracy.images,
            one.label,
        ),
    )


def _part(share: Share) -> float:
    return share.count / share.images


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
    """In turn one of each class."""
    classes: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        classes[record.label].append(record)
    return [record for turn in zip_longest(*classes.values()) for record in turn if record is not None]
