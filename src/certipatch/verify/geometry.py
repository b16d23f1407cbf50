"""What ``verify`` knows of masks: which ones a manifest must have, and whether they cover a patch everywhere.

Nothing here comes from ``geometry``, whose masks are checked by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice, product, zip_longest
from typing import Any, Self

import numpy as np

from .findings import Experiment

MOST_PIXELS = 2**28  # of all masks together, held in memory and looked at for each shape of a patch
MOST_MASKS = 10_000


@dataclass(frozen=True)
class Masks:
    """The entry ``masks`` of an experiment, as anyone may have written it.

    Attributes:
        size: (height, width) of the image in pixels; shapes: those of the patches that the masks are against.
        patches: how many patches there are at once.
        k: masks per axis.
        windows: the (top, left, height, width) in pixels that each mask hides.
    """

    size: list[int]
    shapes: list[list[int]]
    patches: int
    k: int
    windows: list[list[list[int]]]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Self:
        return cls(
            entry["image_size"],
            [entry["patch_size"], *entry.get("other_patch_sizes", [])],
            entry.get("patches", 1),
            entry["masks_per_axis"],
            entry["windows"],
        )

    @property
    def against(self) -> str:
        """What the masks are against, in words."""
        return f"{'a patch' if self.patches == 1 else '2 patches'} of {' or '.join(map(str, self.shapes))}"


def flaws(experiment: Experiment) -> Iterator[str]:
    """What is wrong with the masks and the fill of an experiment.

    Every window must lie within the image and where patch and k demand it, some mask must cover the patch at
    each place, and the fill must be the model's mean.
    """
    masks, model = Masks.of(experiment["masks"]), experiment["model"]
    if masks.size != model["image_size"]:
        yield f"masks.image_size {masks.size} is not the model's {model['image_size']}"
    impossible = next(_impossible(masks), None)
    if impossible is not None:
        yield impossible
        return
    yield from _uncovering(masks)
    fill, mean = experiment.get("fill", model["mean"]), model["mean"]
    if np.shape(fill) != (3,) or not np.allclose(fill, mean, rtol=1e-6, atol=0):
        yield f"fill {fill} is not the model's mean {mean}"


def _impossible(masks: Masks) -> Iterator[str]:
    """Why the masks cannot be tried at all."""
    for patch in masks.shapes:
        if not all(_fits(side, whole) for side, whole in zip(patch, masks.size, strict=True)):
            yield f"masks: a patch of {patch} does not fit into {masks.size}"
    if type(masks.patches) is not int or masks.patches not in (1, 2):
        yield f"masks.patches is {masks.patches!r}"
    if type(masks.k) is not int or masks.k < 1:
        yield f"masks.masks_per_axis is {masks.k!r}"
    pixels = len(masks.windows) * masks.size[0] * masks.size[1] * len(masks.shapes)
    if len(masks.windows) > MOST_MASKS or pixels > MOST_PIXELS:
        yield f"masks: {len(masks.windows)} masks of {masks.size} are too many to check"
    for i, mask in enumerate(masks.windows):
        for window in mask:
            if not _is_within(window, masks.size):
                yield f"masks.windows[{i}]: {window} is not a window within {masks.size}"


def _fits(side: Any, whole: Any) -> bool:
    """Whether one side of a patch fits into one of the image."""
    return type(side) is int and 1 <= side <= whole <= 10_000


def _is_within(window: list[Any], size: list[int]) -> bool:
    top, left, height, width = window
    if not all(type(side) is int for side in window):
        return False
    return (
        min(top, left) >= 0
        and min(height, width) >= 1
        and top + height <= size[0]
        and left + width <= size[1]
    )


def _uncovering(masks: Masks) -> Iterator[str]:
    """Masks in other places than they must be, and places of patches that none of them covers."""
    must = demanded(masks.size, masks.shapes, masks.k, masks.patches, len(masks.windows))
    if not all(mask == other for mask, other in zip_longest(masks.windows, must)):
        yield f"masks.windows are not those that {masks.against} and masks_per_axis {masks.k} demand"
    keep = np.ones((len(masks.windows), *masks.size), dtype=bool)
    for visible, mask in zip(keep, masks.windows, strict=True):
        for top, left, height, width in mask:
            visible[top : top + height, left : left + width] = False
    for patch in masks.shapes:
        hole = uncovered(keep, *patch)
        if hole is not None:
            yield f"masks: a patch of {patch} at {hole} is covered by no mask"
    pair = uncovered_pair(keep, masks.shapes) if masks.patches == 2 else None
    if pair is not None:
        (one, at), (other, there) = pair
        yield f"masks: patches of {one} at {at} and of {other} at {there} are covered by no mask"


def demanded(
    size: list[int], shapes: list[list[int]], k: int, patches: int, most: int
) -> Iterator[list[list[int]]]:
    """The masks that there must be, in their order.

    Against one patch these are the masks of every shape, with one that two shapes share named once; against
    two patches, every two of those. A manifest may demand a great many, so no more are made than show that
    there are more than ``most``.
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
    """By brute force the first place of an h x w patch that no mask covers, or None.

    ``keep`` (masks, H, W) bool is True where a mask leaves the image visible.
    """
    hole = np.ones((keep.shape[1] - h + 1, keep.shape[2] - w + 1), dtype=bool)
    for visible in keep:
        hole &= seen(visible, h, w)
    return tuple(np.argwhere(hole)[0].tolist()) if hole.any() else None


def uncovered_pair(keep: np.ndarray, shapes: list[list[int]]) -> tuple[Any, Any] | None:
    """By brute force two patches, each as (shape, place), of which every mask leaves some visible, or None.

    Every place is tried; of places that are hidden by the same masks one stands for all.
    """
    kinds: list[np.ndarray] = []  # for each kind of place the masks that hide a patch there
    places: list[Any] = []
    for h, w in shapes:
        hides = ~np.stack([seen(visible, h, w) for visible in keep])
        rows = np.ascontiguousarray(hides.reshape(len(keep), -1).T)
        _, first = np.unique(np.packbits(rows, axis=1).view(f"V{-(-len(keep) // 8)}"), return_index=True)
        kinds += list(rows[first])
        places += [([h, w], divmod(int(at), hides.shape[2])) for at in first]
    for i, one in enumerate(kinds):
        both = (np.array(kinds[i:]) & one).any(axis=1)
        if not both.all():
            return places[i], places[i + int(np.argmin(both))]
    return None


def seen(visible: np.ndarray, h: int, w: int) -> np.ndarray:
    """(H-h+1, W-w+1) bool: at which places some of an h x w patch is visible, by all of its pixels."""
    return _any_of(_any_of(visible, h).T, w).T


def _any_of(values: np.ndarray, n: int) -> np.ndarray:
    """True where one of ``n`` values in a row is, along the first axis; the row grows until it is so long."""
    length = 1
    while length < n:
        step = min(length, n - length)
        values = values[:-step] | values[step:]
        length += step
    return values
