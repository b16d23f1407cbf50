"""Which pixels windows show, and which windows a patch reaches: pixel by pixel and place by place.

Nothing here comes from ``geometry``, whose windows are checked by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from .findings import Experiment


@dataclass(frozen=True)
class Sights:
    """Which pixels each window shows, and which windows a patch reaches, from what an experiment says.

    Attributes:
        shown: (windows, height, width) bool.
        shapes: (height, width) of each shape of the patch; patches: how many there are at once.
    """

    shown: np.ndarray
    shapes: list[list[int]]
    patches: int

    @cached_property
    def places(self) -> list[tuple[tuple[int, int, int, int], np.ndarray]]:
        """Every place (top, left, height, width) of each shape, with the windows (windows,) bool reached."""
        sums = np.pad(
            self.shown.cumsum(1, dtype=np.int32).cumsum(2, dtype=np.int32), ((0, 0), (1, 0), (1, 0))
        )
        found = []
        for h, w in self.shapes:
            pixels = sums[:, h:, w:] - sums[:, :-h, w:] - sums[:, h:, :-w] + sums[:, :-h, :-w]
            for top, left in np.ndindex(pixels.shape[1:]):
                found.append(((top, left, h, w), pixels[:, top, left] > 0))
        return found

    @cached_property
    def reached(self) -> np.ndarray:
        """(sets, windows) bool: what a patch, or two, can reach; of one without sets in others."""
        single = self._largest(np.array([row for _, row in self.places]))
        if self.patches == 1:
            return single
        return np.unique([one | other for one in single for other in single], axis=0)

    @staticmethod
    def _largest(rows: np.ndarray) -> np.ndarray:
        rows = np.unique(rows, axis=0)
        return np.array([row for row in rows if sum(not (row & ~other).any() for other in rows) == 1])

    def reached_by(self, patches: Sequence[Sequence[int]]) -> np.ndarray:
        """(windows,) bool: the windows that show a pixel of one of these patches."""
        rows = [self.shown[:, y : y + h, x : x + w].any(axis=(1, 2)) for y, x, h, w in patches]
        return np.asarray(np.any(rows, axis=0))


def sights_of(experiment: Experiment) -> Sights:
    """The windows of an experiment, and the patches that it is against."""
    return _sights(experiment["windows"], json.dumps(experiment["threat"]))


@lru_cache(maxsize=4)
def _sights(windows: str, stated: str) -> Sights:
    threat: dict[str, Any] = json.loads(stated)
    shapes = [threat["patch_size"], *threat.get("other_patch_sizes", [])]
    return Sights(shown_by(windows, threat["image_size"]), shapes, threat.get("patches", 1))


def shown_by(windows: str, image_size: list[int]) -> np.ndarray:
    """(windows, height, width) bool: which pixels each window shows, pixel by pixel."""
    found = re.fullmatch(r"(columns|blocks|cells):(\d+)(?:/(\d+))?", windows)
    if found is None:
        raise ValueError(f"windows {windows!r}")
    side, stride = int(found[2]), int(found[3] or 1)
    y, x = np.indices(image_size)
    if found[1] == "cells":
        tops, lefts = (range(0, n - side + 1, stride) for n in image_size)
        squares = [(top, left) for top in tops for left in lefts]
        return np.array(
            [(y >= top) & (y < top + side) & (x >= left) & (x < left + side) for top, left in squares]
        )
    tops = range(0, image_size[0], stride) if found[1] == "blocks" else range(1)
    height = side if found[1] == "blocks" else image_size[0]
    return np.array(
        [
            ((y - top) % image_size[0] < height) & ((x - left) % image_size[1] < side)
            for top in tops
            for left in range(0, image_size[1], stride)
        ]
    )
