"""Mask sets that cover every position of an adversarial patch.

Source: PatchCleanser (Xiang, Mahloujifar, Mittal; USENIX Security 2022), section 3.2 "R-covering mask set",
and its code for several shapes and two patches (misc/pc_multiple.py); the coarse set of Multi-size Greedy
Cutout: Greedy Cutout, section 3.

Here is geometry on integers only. A *patch* is the attacker's region, a *mask* the defender's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, combinations_with_replacement, permutations, product
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from .patch import Size, Window, _check_patch, by

if TYPE_CHECKING:
    import torch


def axis_starts(n: int, p: int, k: int) -> tuple[int, list[int]]:
    """Mask side and mask starts on one axis of ``n`` pixels, patch side ``p``, at most ``k`` masks.

    Stride ``s = ceil((n-p+1)/k)``, side ``m = min(p+s-1, n)``, starts ``0, s, 2s, ...`` and ``n-m`` itself.
    Two neighbouring starts differ by at most ``s``, so each of the ``n-p+1`` patch positions lies within a
    mask.

    >>> axis_starts(224, 39, 3)
    (100, [0, 62, 124])
    """
    s = -(-(n - p + 1) // k)
    m = min(p + s - 1, n)
    return m, sorted({*range(0, n - m + 1, s), n - m})


@dataclass(frozen=True)
class MaskSet:
    """Masks such that whatever the attacker places is covered by at least one of them.

    He has one patch of ``patch_size``, or of one of the ``other_patch_sizes``; or ``patches`` of them at
    once, which one mask has to cover together.

    Attributes:
        image_size, patch_size: (height, width) in pixels.
        masks_per_axis: k as asked for, an upper bound; 0 where none was.
        windows: for each mask the tuple of rectangles that it hides.
        grid: of a set for one patch of one shape, the number of mask rows and columns (row-major order), else
            None.
        other_patch_sizes: further shapes, (height, width) each.
        patches: 1, or 2 for two patches, of any of the shapes each; they may overlap.
    """

    image_size: Size
    patch_size: Size
    masks_per_axis: int
    windows: tuple[tuple[Window, ...], ...]
    grid: Size | None = field(default=None, compare=False)
    other_patch_sizes: tuple[Size, ...] = ()
    patches: int = 1

    def __post_init__(self) -> None:
        """Refuse what would make "every patch is covered" hold of nothing, or mean other pixels than it
        says."""
        if min(self.image_size) < 1:
            raise ConfigError(f"image size {by(self.image_size)}: expected at least 1x1 pixels")
        for size in self.patch_sizes:
            _check_patch(size, self.image_size, shown=by(size))
        if self.patches not in (1, 2):
            raise ConfigError(f"patches {self.patches}: expected 1 or 2 at once")
        for window in (window for mask in self.windows for window in mask):
            if min(window.top, window.left, window.height, window.width) < 0:
                raise ConfigError(f"masks: expected windows with nothing negative, found {window}")

    @classmethod
    def covering(
        cls,
        *,
        image_size: Size,
        patch_size: Size,
        masks_per_axis: int,
        other_patch_sizes: Iterable[Size] = (),
        patches: int = 1,
    ) -> MaskSet:
        """The R-covering set of PatchCleanser: the product of :func:`axis_starts` of both axes, row by row.

        Of several shapes it is the union of each one's set, the tallest shape first. For two patches a mask
        is the union of two different masks of the set for one. (PatchCleanser's code has each mask united
        with itself as well. Those hide nothing that is not hidden by another, so without them the set covers
        as much, costs less and demands less of a certificate.)

        Raises ConfigError for sizes that are not positive, a patch larger than the image, a
        ``masks_per_axis`` below 1 or above the number of patch positions on an axis, a shape that fits into
        another, or other than 1 or 2 patches.
        """
        sizes = sorted({patch_size, *other_patch_sizes}, reverse=True)
        for small, large in permutations(sizes, 2):
            if small[0] <= large[0] and small[1] <= large[1]:
                raise ConfigError(
                    f"patch {by(small)}: fits into {by(large)}, whose masks cover it; drop it, or certify "
                    "for each (with a comma)"
                )
        grids = [_grid(image_size, size, masks_per_axis) for size in sizes]
        masks: tuple[tuple[Window, ...], ...] = tuple(
            dict.fromkeys((window,) for windows, _ in grids for window in windows)
        )
        if patches == 2:
            masks = tuple(one + other for one, other in combinations(masks, 2)) or masks
        grid = grids[0][1] if len(sizes) == patches == 1 else None
        return cls(
            image_size,
            sizes[0],
            masks_per_axis,
            masks,
            grid,
            other_patch_sizes=tuple(sizes[1:]),
            patches=patches,
        )

    def __len__(self) -> int:
        return len(self.windows)

    @cached_property
    def keep(self) -> torch.Tensor:
        """(masks, height, width) bool on the CPU, True = visible."""
        import torch

        keep = torch.ones(len(self), *self.image_size, dtype=torch.bool)
        for i, mask in enumerate(self.windows):
            for w in mask:
                keep[i, w.top : w.top + w.height, w.left : w.left + w.width] = False
        return keep

    @property
    def patch_sizes(self) -> tuple[Size, ...]:
        """Every shape that a patch may have."""
        return (self.patch_size, *self.other_patch_sizes)

    @property
    def threat(self) -> dict[str, Any]:
        """What the set is against, as :meth:`covering` takes it: ``patch_size``, and of the rest what is not
        its default."""
        rest = {"other_patch_sizes": self.other_patch_sizes} if self.other_patch_sizes else {}
        return {
            "patch_size": self.patch_size,
            **rest,
            **({"patches": self.patches} if self.patches != 1 else {}),
        }

    @property
    def name(self) -> str:
        """``39x39-k6``, ``39x20+20x39-k6``, ``2-patches-20x20-k3``: the folder of its records where there are
        several."""
        patches = f"{self.patches}-patches-" if self.patches != 1 else ""
        return f"{patches}{'+'.join(map(by, self.patch_sizes))}-k{self.masks_per_axis}"

    def to_json(self) -> dict[str, Any]:
        """The set as a manifest states it: the threat, and each mask's windows as [top, left, height,
        width]."""
        return {
            **self.threat,
            "image_size": self.image_size,
            "masks_per_axis": self.masks_per_axis,
            "windows": [[[w.top, w.left, w.height, w.width] for w in mask] for mask in self.windows],
        }

    def coarsen(self) -> tuple[MaskSet, tuple[tuple[int, ...], ...]]:
        """The coarse set: each mask is the union of a 2x2 block of neighbouring masks of this grid.

        Returns the coarse set and, for each coarse mask, the indices of its (4) children here. Where the
        number of starts is odd, the last block overlaps its neighbour, so every fine mask lies in a coarse
        one and the coarse set covers whatever this one does. Neighbours touch or overlap, so the union is a
        rectangle.

        Raises ConfigError for a set that is not a grid.
        """
        if self.grid is None:
            raise ConfigError(
                "only a grid of masks can be coarsened; build it with MaskSet.covering, for one patch of "
                "one shape"
            )
        rows, columns = self.grid
        windows, children = [], []
        for row_block, column_block in product(_pairs(rows), _pairs(columns)):
            block = tuple(r * columns + c for r, c in product(row_block, column_block))
            first, last = self.windows[block[0]][0], self.windows[block[-1]][0]
            height = last.top + last.height - first.top
            width = last.left + last.width - first.left
            windows.append((Window(first.top, first.left, height, width),))
            children.append(block)
        grid = (len(_pairs(rows)), len(_pairs(columns)))
        return MaskSet(self.image_size, self.patch_size, 0, tuple(windows), grid=grid), tuple(children)

    def uncovered_patches(self) -> tuple[Window, ...] | None:
        """Patches that the attacker may place and no mask covers, or None if the set covers: exact,
        everything is tried.

        Two patches are covered by a mask that hides both. That depends only on which masks hide each, so of
        all places one is tried for each different answer to that, with every other.
        """
        if self.patches == 1:
            holes = (self.uncovered_patch(size) for size in self.patch_sizes)
            return next(((hole,) for hole in holes if hole), None)
        places: dict[int, Window] = {}  # by the masks that hide a patch there, one bit each
        for h, w in self.patch_sizes:
            hidden = np.zeros((len(self), self.image_size[0] - h + 1, self.image_size[1] - w + 1), dtype=bool)
            for mask, where in zip(hidden, self._hidden((h, w)), strict=True):
                mask[:] = where
            bits = np.packbits(hidden, axis=0)
            for top, left in np.ndindex(bits.shape[1:]):
                places.setdefault(int.from_bytes(bits[:, top, left].tobytes()), Window(top, left, h, w))
        pairs = combinations_with_replacement(places.items(), 2)
        return next(((one, other) for (a, one), (b, other) in pairs if not a & b), None)

    def uncovered_patch(self, patch_size: Size) -> Window | None:
        """A position of one patch that no mask covers, or None if the set covers: exact, every position is
        tried.

        A mask covers a patch if it hides each of its pixels, be it with several windows.
        """
        (h, w), (height, width) = patch_size, self.image_size
        _check_patch(patch_size, self.image_size, shown=by(patch_size))
        covered = np.zeros((height - h + 1, width - w + 1), dtype=bool)
        for hidden in self._hidden(patch_size):
            covered |= hidden
        if covered.all():
            return None
        top, left = np.argwhere(~covered)[0]
        return Window(int(top), int(left), h, w)

    def _hidden(self, patch_size: Size) -> Iterator[np.ndarray]:
        """For each mask (H-h+1, W-w+1) bool: at which positions it hides all of a patch."""
        (h, w), (height, width) = patch_size, self.image_size
        for mask in self.windows:
            visible = np.ones((height, width), dtype=np.int32)
            for win in mask:
                visible[win.top : win.top + win.height, win.left : win.left + win.width] = 0
            # Summed-area table: the number of visible pixels in each h x w box.
            total = np.zeros((height + 1, width + 1), dtype=np.int32)
            total[1:, 1:] = visible.cumsum(0).cumsum(1)
            yield total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w] == 0


def _grid(image_size: Size, patch_size: Size, masks_per_axis: int) -> tuple[list[Window], Size]:
    """The windows of the R-covering set of one shape, and the number of their rows and columns."""
    _check_patch(patch_size, image_size, shown=by(patch_size))
    most = max(n - p + 1 for n, p in zip(image_size, patch_size, strict=True))
    if not 1 <= masks_per_axis <= most:
        raise ConfigError(
            f"masks per axis {masks_per_axis}: expected 1 to {most}, the positions on an axis of a patch of "
            f"{by(patch_size)} in an image of "
            f"{by(image_size)}; choose a smaller patch or --masks-per-axis"
        )
    (height, tops), (width, lefts) = (
        axis_starts(n, p, min(masks_per_axis, n - p + 1)) for n, p in zip(image_size, patch_size, strict=True)
    )
    return [Window(top, left, height, width) for top, left in product(tops, lefts)], (len(tops), len(lefts))


def _pairs(n: int) -> list[tuple[int, ...]]:
    """Blocks of two neighbours out of ``n``; the last overlaps where ``n`` is odd: 5 -> (0,1) (2,3) (3,4)."""
    if n == 1:
        return [(0,)]
    return [(start, start + 1) for start in sorted({*range(0, n - 1, 2), n - 2})]
