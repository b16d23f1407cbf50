"""What ``verify`` knows of masks: which ones a manifest must have, and whether they cover, by brute force.

Like ``verify``, it restates what it checks: nothing here comes from ``masks``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, islice, product
from typing import Any

import numpy as np


def demanded(size: list[int], shapes: list[list[int]], k: int, patches: int, most: int) -> Iterator[list[list[int]]]:
    """The masks against one patch of any of the shapes, what two shapes share once; or, against two patches, every two of those.

    No more than are needed to see that there are more than ``most``: a manifest may demand a great many.
    """
    each = ((*corner, *sides) for patch in shapes for corner, *sides in _covering(size, patch, k))
    masks = list(dict.fromkeys(islice(each, len(shapes) * (most + 2))))
    yield from ([list(window) for window in mask] for mask in combinations(masks, patches if len(masks) > 1 else 1))


def _covering(size: list[int], patch: list[int], k: int) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Corner, height and width of each mask of PatchCleanser's R-covering set, row by row."""
    sides, starts = [], []
    for n, p in zip(size, patch, strict=True):
        stride = math.ceil((n - p + 1) / min(k, n - p + 1))
        side = min(p + stride - 1, n)
        starts.append([min(i * stride, n - side) for i in range(math.ceil((n - side) / stride) + 1)])
        sides.append(side)
    for corner in product(*starts):
        yield (corner[0], corner[1]), sides[0], sides[1]


def uncovered(keep: np.ndarray, h: int, w: int) -> tuple[int, int] | None:
    """Brute force: the first place of an h x w patch at which every mask of ``keep`` (masks, H, W) leaves some of it visible."""
    hole = np.ones((keep.shape[1] - h + 1, keep.shape[2] - w + 1), dtype=bool)
    for visible in keep:
        hole &= _seen(visible, h, w)
    return tuple(np.argwhere(hole)[0].tolist()) if hole.any() else None


def uncovered_pair(keep: np.ndarray, shapes: list[list[int]]) -> tuple[Any, Any] | None:
    """Brute force: two patches, each as (shape, place), such that every mask leaves some of one of them visible.

    Every place is looked at; of places that are hidden by the same masks one stands for all.
    """
    kinds: list[np.ndarray] = []  # for each kind of place the masks that hide a patch there
    places: list[Any] = []
    for h, w in shapes:
        hides = ~np.stack([_seen(visible, h, w) for visible in keep])
        rows = np.ascontiguousarray(hides.reshape(len(keep), -1).T)
        _, first = np.unique(np.packbits(rows, axis=1).view(f"V{-(-len(keep) // 8)}"), return_index=True)
        kinds += list(rows[first])
        places += [([h, w], divmod(int(at), hides.shape[2])) for at in first]
    for i, one in enumerate(kinds):
        both = (np.array(kinds[i:]) & one).any(axis=1)
        if not both.all():
            return places[i], places[i + int(np.argmin(both))]
    return None


def _seen(visible: np.ndarray, h: int, w: int) -> np.ndarray:
    """(H-h+1, W-w+1): at which places some of an h x w patch is visible, by trying every one of its pixels."""

    def any_of(values: np.ndarray, n: int) -> np.ndarray:
        """True where one of ``n`` values in a row is, along the first axis: the row grows until it is as long."""
        length = 1
        while length < n:
            step = min(length, n - length)
            values = values[:-step] | values[step:]
            length += step
        return values

    return any_of(any_of(visible, h).T, w).T
