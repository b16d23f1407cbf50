"""What ``verify`` knows of masks: which ones a manifest must have, and whether they cover, by brute force.

Like ``verify``, it restates what it checks: nothing here comes from ``masks``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, islice, product, zip_longest
from typing import Any

import numpy as np

from .findings import Verification

MOST_PIXELS = 2**28  # of all masks together, held in memory


def _check_geometry(experiment: dict[str, Any], found: Verification) -> bool:
    """Windows inside the image, in the places that patch and k demand, over every position of the patch; the
    fill. True if all is so."""
    masks, before = experiment["masks"], len(found.findings)
    size, k, windows = masks["image_size"], masks["masks_per_axis"], masks["windows"]
    shapes, patches = [masks["patch_size"], *masks.get("other_patch_sizes", [])], masks.get("patches", 1)
    if size != experiment["model"]["image_size"]:
        found.add(
            "manifest", f"masks.image_size {size} is not the model's {experiment['model']['image_size']}"
        )
    for patch in shapes:
        if not all(
            type(side) is int and 1 <= side <= whole <= 10_000
            for side, whole in zip(patch, size, strict=True)
        ):
            found.add("manifest", f"masks: a patch of {patch} does not fit into {size}")
            return False
    if type(patches) is not int or patches not in (1, 2):
        found.add("manifest", f"masks.patches is {patches!r}")
        return False
    if type(k) is not int or k < 1:
        found.add("manifest", f"masks.masks_per_axis is {k!r}")
        return False
    if len(windows) * size[0] * size[1] > MOST_PIXELS:
        found.add("manifest", f"masks: {len(windows)} masks of {size} are too many to check")
        return False
    keep = np.ones((len(windows), *size), dtype=bool)
    for i, mask in enumerate(windows):
        for window in mask:
            top, left, height, width = window
            if (
                not all(type(side) is int for side in window)
                or min(top, left) < 0
                or min(height, width) < 1
                or top + height > size[0]
                or left + width > size[1]
            ):
                found.add("manifest", f"masks.windows[{i}]: {window} is not a window within {size}")
                return False
            keep[i, top : top + height, left : left + width] = False
    against = f"{f'{patches} patches' if patches > 1 else 'a patch'} of {' or '.join(map(str, shapes))}"
    if not all(
        mask == demanded
        for mask, demanded in zip_longest(windows, demanded(size, shapes, k, patches, len(windows)))
    ):
        found.add("manifest", f"masks.windows are not those that {against} and masks_per_axis {k} demand")
    for patch in shapes:
        if hole := uncovered(keep, *patch):
            found.add("manifest", f"masks: a patch of {patch} at {hole} is covered by no mask")
    if patches == 2 and (pair := uncovered_pair(keep, shapes)):
        found.add(
            "manifest",
            f"masks: patches of {pair[0][0]} at {pair[0][1]} and of {pair[1][0]} at {pair[1][1]} are "
            "covered by no mask",
        )
    if found.kind == "certify" and type(experiment["exhaustive"]) is not bool:
        found.add("manifest", f"exhaustive is {experiment['exhaustive']!r}")
    if experiment.get("inference", "challenger") != "challenger":  # the default is not stated
        found.add("manifest", f"inference is {experiment['inference']!r}, expected 'challenger' or none")
    fill, mean = experiment["fill"], experiment["model"]["mean"]
    if np.shape(fill) != (3,) or not np.allclose(fill, mean, rtol=1e-6, atol=0):
        found.add("manifest", f"fill {fill} is not the model's mean {mean}")
    return len(found.findings) == before


def demanded(
    size: list[int], shapes: list[list[int]], k: int, patches: int, most: int
) -> Iterator[list[list[int]]]:
    """The masks against one patch of any of the shapes, what two shapes share once; or, against two patches,
    every two of those.

    No more than are needed to see that there are more than ``most``: a manifest may demand a great many.
    """
    each = ((*corner, *sides) for patch in shapes for corner, *sides in _covering(size, patch, k))
    masks = list(dict.fromkeys(islice(each, len(shapes) * (most + 2))))
    yield from (
        [list(window) for window in mask] for mask in combinations(masks, patches if len(masks) > 1 else 1)
    )


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
    """Brute force: the first place of an h x w patch at which every mask of ``keep`` (masks, H, W) leaves
    some of it visible."""
    hole = np.ones((keep.shape[1] - h + 1, keep.shape[2] - w + 1), dtype=bool)
    for visible in keep:
        hole &= _seen(visible, h, w)
    return tuple(np.argwhere(hole)[0].tolist()) if hole.any() else None


def uncovered_pair(keep: np.ndarray, shapes: list[list[int]]) -> tuple[Any, Any] | None:
    """Brute force: two patches, each as (shape, place), such that every mask leaves some of one of them
    visible.

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
    """(H-h+1, W-w+1): at which places some of an h x w patch is visible, by trying every one of its
    pixels."""

    def any_of(values: np.ndarray, n: int) -> np.ndarray:
        """True where one of ``n`` values in a row is, along the first axis: the row grows until it is as
        long."""
        length = 1
        while length < n:
            step = min(length, n - length)
            values = values[:-step] | values[step:]
            length += step
        return values

    return any_of(any_of(visible, h).T, w).T
