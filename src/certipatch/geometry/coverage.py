"""Is every place of a patch hidden by a mask? Exact answers, with a counterexample where one is not.

A certificate rests on this: PatchCleanser (Xiang, Mahloujifar, Mittal; USENIX Security 2022) calls a set of
masks R-covering if for each place of a patch some mask hides the whole patch. Nothing here trusts how a set
was made: every place is tried.

Masks are tuples of :class:`~certipatch.geometry.patch.Window`; sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement

import numpy as np

from .patch import Size, Threat, Window, by, check_patch, size_of

Mask = tuple[Window, ...]  # the rectangles that one mask hides


def hidden_places(masks: Sequence[Mask], image_size: Size, patch_size: Size) -> Iterator[np.ndarray]:
    """For each mask (H-h+1, W-w+1) bool: at which places it hides all of an h x w patch.

    A place is the patch's top left pixel. A mask hides a patch if it hides each of its pixels, be it with
    several windows.
    """
    (h, w), (height, width) = size_of(patch_size, "patch size"), size_of(image_size, "image size")
    for mask in masks:
        visible = np.ones((height, width), dtype=np.int32)
        for win in mask:
            visible[win.top : win.top + win.height, win.left : win.left + win.width] = 0
        # Summed-area table: the number of visible pixels in each h x w box.
        total = np.zeros((height + 1, width + 1), dtype=np.int32)
        total[1:, 1:] = visible.cumsum(0).cumsum(1)
        yield total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w] == 0


def uncovered_patches(masks: Sequence[Mask], image_size: Size, threat: Threat) -> tuple[Window, ...] | None:
    """Patches that the attacker may place and no mask covers together, or None if the masks cover all."""
    if threat.patches == 2:
        return uncovered_pair(masks, image_size, threat.patch_sizes)
    holes = (uncovered_patch(masks, image_size, size) for size in threat.patch_sizes)
    return next(((hole,) for hole in holes if hole), None)


def uncovered_patch(masks: Sequence[Mask], image_size: Size, patch_size: Size) -> Window | None:
    """A place of one patch that no mask covers, or None if the masks cover each place.

    Raises ConfigError for a patch that is empty or larger than the image.
    """
    (h, w), (height, width) = size_of(patch_size, "patch size"), size_of(image_size, "image size")
    check_patch(patch_size, image_size, shown=by(patch_size))
    covered = np.zeros((height - h + 1, width - w + 1), dtype=bool)
    for hidden in hidden_places(masks, image_size, patch_size):
        covered |= hidden
    if covered.all():
        return None
    top, left = np.argwhere(~covered)[0]
    return Window(int(top), int(left), h, w)


def uncovered_pair(
    masks: Sequence[Mask], image_size: Size, patch_sizes: Sequence[Size]
) -> tuple[Window, Window] | None:
    """Two patches of these shapes that no single mask hides both of, or None if there are none.

    Whether a mask hides both depends only on which masks hide each. So of all places that the same masks
    hide, one is tried with one of every other kind.
    """
    kinds: dict[int, Window] = {}
    for size in patch_sizes:
        for place, hiding in _places(masks, image_size, size):
            kinds.setdefault(hiding, place)
    pairs = combinations_with_replacement(kinds.items(), 2)
    return next(((one, other) for (a, one), (b, other) in pairs if not a & b), None)


def _places(masks: Sequence[Mask], image_size: Size, patch_size: Size) -> Iterator[tuple[Window, int]]:
    """Every place of a patch with the masks that hide the patch there, one bit of the integer for each."""
    (h, w), (height, width) = size_of(patch_size, "patch size"), size_of(image_size, "image size")
    hidden = np.zeros((len(masks), height - h + 1, width - w + 1), dtype=bool)
    for i, where in enumerate(hidden_places(masks, image_size, patch_size)):
        hidden[i] = where
    bits = np.packbits(hidden, axis=0)
    for top, left in np.ndindex(bits.shape[1:]):
        yield Window(top, left, h, w), int.from_bytes(bits[:, top, left].tobytes())
