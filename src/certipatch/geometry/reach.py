"""Which windows of limited sight a patch can reach: by trying every place, and by no formula.

Published code counts the windows that a patch of m pixels reaches of bands of b pixels and stride s as
``ceil((m+b-1)/s)``. That is one too few where bands go on at the opposite border and the stride does not
divide the image: 5 pixels, b = 2, s = 2, m = 1 has the bands {0, 1}, {2, 3} and {4, 0}, and a patch on pixel
0 reaches two of them, not one. So nothing here is a formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np

from .patch import Size, Threat, Window, by, check_patch
from .sights import Sight

Patches = tuple[Window, ...]  # what the attacker places at once


class Reach(NamedTuple):
    """What a patch can reach, each set of windows once.

    Attributes:
        touch: (sets, windows) bool: the windows that show a pixel of the patch.
        places: for each set, patches that reach just it.
    """

    touch: np.ndarray
    places: tuple[Patches, ...]


def touched(sights: Sequence[Sight], image_size: Size, threat: Threat) -> Reach:
    """The sets of windows that the attacker can reach, each once.

    A set within another is left out: whoever reaches the larger one may leave windows as they are, so a
    certificate against it is one against the smaller. For two patches the sets are the unions of two for one.

    Raises ConfigError for a patch that is empty or larger than the image.
    """
    found: dict[bytes, tuple[np.ndarray, Patches]] = {}
    for size in threat.patch_sizes:
        check_patch(size, image_size, shown=by(size))
        for place, row in every_place(sights, image_size, size):
            found.setdefault(row.tobytes(), (row, (place,)))
    singles = _largest(list(found.values()))
    if threat.patches == 2:
        pairs = combinations_with_replacement(singles, 2)
        unions = {(a | b).tobytes(): (a | b, one + other) for (a, one), (b, other) in pairs}
        singles = list(unions.values())
    rows, places = zip(*singles, strict=True)
    return Reach(np.array(rows, dtype=bool).reshape(len(rows), len(sights)), places)


def every_place(
    sights: Sequence[Sight], image_size: Size, patch_size: Size
) -> Iterator[tuple[Window, np.ndarray]]:
    """Every place of a patch with the windows (windows,) bool that show a pixel of it."""
    (h, w), (height, width) = patch_size, image_size
    most = max((len(sight) for sight in sights), default=1)
    nothing = Window(0, 0, 0, 0)
    shown = np.array(
        [
            [(r.top, r.left, r.top + r.height, r.left + r.width) for r in (*sight, *[nothing] * most)][:most]
            for sight in sights
        ]
    ).reshape(len(sights), most, 4)
    top, left, bottom, right = np.moveaxis(shown, 2, 0)
    # Two intervals overlap if each begins before the other ends; an empty rectangle overlaps nothing.
    for y in range(height - h + 1):
        at_row = (top < y + h) & (y < bottom)
        for x in range(width - w + 1):
            meets: np.ndarray = at_row & (left < x + w) & (x < right)
            yield Window(y, x, h, w), np.asarray(meets.any(axis=1))


def _largest(found: list[tuple[np.ndarray, Patches]]) -> list[tuple[np.ndarray, Patches]]:
    """Those sets that lie in no other one; no set is there twice."""
    rows = np.array([row for row, _ in found], dtype=np.float32)
    keep = [int((rows @ row == row.sum()).sum()) == 1 for row in rows]  # the set itself contains it, no other
    return [one for one, largest in zip(found, keep, strict=True) if largest]
