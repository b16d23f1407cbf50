"""The ways to a wrong answer that a clean table leaves open, which ``verify`` counts in an attack.

Nothing here comes from ``redteam``, whose count is checked by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from .findings import Record
from .geometry import Masks, seen
from .patchcleanser import Table
from .restatement import Sighting

WILD_IN_TABLES = 4  # so many views within the tolerance are tried both ways, for the goals of a whole table

Goal = tuple[int | None, int | None]  # which mask is to disagree and towards which label; None to outvote


@dataclass(frozen=True)
class Goals:
    """The ways to a wrong answer that a clean table leaves open, place by place."""

    masks: Masks

    @cached_property
    def visible(self) -> np.ndarray:
        """(masks, H, W) bool: which pixels each mask leaves visible."""
        keep = np.ones((len(self.masks.windows), *self.masks.size), dtype=bool)
        for shown, mask in zip(keep, self.masks.windows, strict=True):
            for top, left, height, width in mask:
                shown[top : top + height, left : left + width] = False
        return keep

    def open(self, labels: np.ndarray, label: int) -> dict[tuple[int, Goal], np.ndarray]:
        """For each number of a shape and goal that is open somewhere: (places) bool, where it is open.

        To outvote, every mask whose row is right throughout must show some of the patch; for a mask to
        disagree, each of its pairs that hides the patch must answer the target already.
        """
        found = {}
        for (goal, must), (number, shape) in product(self._ways(labels, label), enumerate(self.masks.shapes)):
            sides = (side - p + 1 for side, p in zip(self.masks.size, shape, strict=True))
            at = np.ones(tuple(sides), dtype=bool)
            for shown in must:
                at &= seen(shown, *shape)
            if at.any():
                found[number, goal] = at
        return found

    def _ways(self, labels: np.ndarray, label: int) -> Iterator[tuple[Goal, list[np.ndarray]]]:
        """Each goal, and the views that must show some of the patch, by what they leave visible."""
        rows = enumerate(labels)
        yield (None, None), [self.visible[i] for i, row in rows if (row == label).all()]
        for i, row in enumerate(labels):
            for target in sorted(set(row.tolist()) - {label}):
                yield (i, target), [self.visible[i] & self.visible[j] for j in np.flatnonzero(row != target)]


def compare_goal(sighting: Sighting, table: Table, goals: Goals) -> None:
    """The line counts the goals that are open on the clean image, and its patch has one of them; or would if
    rounding had moved some of the labels."""
    record, wild = (
        sighting.record,
        [pair for pair, view in table.items() if view.margin <= sighting.tolerance],
    )
    what = _other_goals(record, {pair: view.best for pair, view in table.items()}, goals)
    if what is None:
        return
    either = product(*((table[pair].best, table[pair].second) for pair in wild[:WILD_IN_TABLES]))
    possible = len(wild) > WILD_IN_TABLES or any(
        _other_goals(
            record,
            {pair: view.best for pair, view in table.items()} | dict(zip(wild, chosen, strict=True)),
            goals,
        )
        is None
        for chosen in either
    )
    sighting.differs(what, surely=not possible)


def _other_goals(record: Record, table: dict[tuple[int, int], int], goals: Goals) -> str | None:
    """What a line says otherwise than the goals that are open in a table of labels; None if nothing."""
    n = len(goals.masks.windows)
    labels = np.empty((n, n), dtype=int)
    for (i, j), label in table.items():
        labels[i, j] = labels[j, i] = label
    ways = goals.open(labels, record["label"])
    if len(ways) != record["ways"]:
        return f"ways {record['ways']!r}, found {len(ways)}"
    shape = goals.masks.shapes.index([record["height"], record["width"]])
    at = ways.get((shape, (record["row"], record["target"])))
    anywhere = not ways and record["row"] is None
    if anywhere or (at is not None and at[record["top"], record["left"]]):
        return None
    return f"row {record['row']!r}, target {record['target']!r} is not open to a patch there"
