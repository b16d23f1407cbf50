"""At which places of the patch an answer is proven: the geometry of PatchCleanser's certificate by place.

Which masks hide a patch decides everything about a place, so places that the same masks hide are of one
*kind*, and are counted together. The theorem is that of ``proven_rows`` in
``defenses/patchcleanser/algorithms.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement

import numpy as np

from .coverage import Mask, hidden_places
from .masks import MaskSet
from .patch import Size, Threat


@dataclass(frozen=True)
class Places:
    """Every place that the attacker's patch can have, by the masks that hide the patch there.

    A place of two patches is a pair of places, one for each.

    Attributes:
        kinds: for each shape of the patch (H-h+1, W-w+1) int64: the kind at each top left pixel.
        hidden: (kinds, masks) bool: which masks hide all of the patch at a place of the kind.
        patches: how many patches there are at once, 1 or 2.
    """

    kinds: tuple[np.ndarray, ...]
    hidden: np.ndarray
    patches: int

    @classmethod
    def of(cls, windows: Sequence[Mask], image_size: Size, threat: Threat) -> Places:
        """The places of a threat, under masks with these windows."""
        hidden, shapes, size = [], [], len(windows)
        for patch_size in threat.patch_sizes:
            found = np.array(list(hidden_places(windows, image_size, patch_size)))
            shapes.append(found.shape[1:])
            hidden.append(found.reshape(size, -1).T)
        packed = np.packbits(np.concatenate(hidden), axis=1)
        unique, kind = np.unique(packed, axis=0, return_inverse=True)
        ends = np.cumsum([height * width for height, width in shapes])
        parts = np.split(kind.reshape(-1), ends[:-1])
        kinds = tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        return cls(kinds, np.unpackbits(unique, axis=1, count=size).astype(bool), threat.patches)

    def proven(self, rows: np.ndarray) -> np.ndarray:
        """At which kinds of places a mask with a proven row hides the patch, or both patches together.

        Args:
            rows: (masks,) bool.

        Returns:
            (kinds,) bool, or (kinds, kinds) bool of two patches.
        """
        by = self.hidden & rows
        return by.any(axis=1) if self.patches == 1 else (by.astype(np.float32) @ self.hidden.T) > 0

    def share(self, rows: np.ndarray) -> float:
        """The share of all places that are proven; of several shapes the least, for the attacker takes his
        own."""
        proven, of_shape = self.proven(rows), self.counts
        if self.patches == 1:
            return min(int(counts @ proven) / int(counts.sum()) for counts in of_shape)
        return min(
            int(one @ proven @ other) / (int(one.sum()) * int(other.sum()))
            for one, other in combinations_with_replacement(of_shape, 2)
        )

    @cached_property
    def counts(self) -> list[np.ndarray]:
        """For each shape (kinds,) int64: how many of its places are of each kind."""
        return [np.bincount(kind.reshape(-1), minlength=len(self.hidden)) for kind in self.kinds]


def proven_places(rows: np.ndarray, masks: MaskSet) -> tuple[np.ndarray, ...]:
    """At which places a patch can do nothing: those where a mask with a proven row hides all of it.

    Args:
        rows: (masks,) bool, as ``proven_rows`` of ``defenses/patchcleanser/algorithms.py`` finds them.

    Returns:
        for each shape of the patch (H-h+1, W-w+1) bool, by the top left pixel. Of two patches, for every two
        shapes the same with four axes: the place of the one patch and that of the other.
    """
    places = Places.of(masks.windows, masks.image_size, masks.threat)
    proven = places.proven(rows)
    if places.patches == 1:
        return tuple(proven[kind] for kind in places.kinds)
    pairs = combinations_with_replacement(places.kinds, 2)
    return tuple(proven[one[:, :, None, None], other] for one, other in pairs)
