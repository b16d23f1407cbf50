"""Mask sets that cover every position of an adversarial patch.

Source: PatchCleanser (Xiang, Mahloujifar, Mittal; USENIX Security 2022), section 3.2 "R-covering mask set";
the coarse set of Multi-size Greedy Cutout: Greedy Cutout, section 3.

Here is geometry on integers only. A *patch* is the attacker's region, a *mask* the defender's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import product
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError

if TYPE_CHECKING:  # torch is imported when a tensor is asked for, so that reading records stays quick
    import torch

Size = tuple[int, int]  # (height, width) in pixels of the tensor the model sees


@dataclass(frozen=True, order=True)
class Window:
    """A rectangle of pixels: rows ``top .. top+height-1``, columns ``left .. left+width-1``."""

    top: int
    left: int
    height: int
    width: int


def axis_starts(n: int, p: int, k: int) -> tuple[int, list[int]]:
    """Mask side and mask starts on one axis of ``n`` pixels, patch side ``p``, at most ``k`` masks.

    Stride ``s = ceil((n-p+1)/k)``, side ``m = min(p+s-1, n)``, starts ``0, s, 2s, ...`` and ``n-m`` itself.
    Two neighbouring starts differ by at most ``s``, so each of the ``n-p+1`` patch positions lies within a mask.

    >>> axis_starts(224, 39, 3)
    (100, [0, 62, 124])
    """
    s = -(-(n - p + 1) // k)
    m = min(p + s - 1, n)
    return m, sorted({*range(0, n - m + 1, s), n - m})


def patch_side(percent: Fraction, image_size: Size) -> int:
    """Side of the smallest square patch that is at least ``percent`` % of the image: rounded *up*, exactly.

    >>> [patch_side(Fraction(p), (224, 224)) for p in (1, 2, 3)]
    [23, 32, 39]
    """
    area = percent / 100 * image_size[0] * image_size[1]
    return isqrt(-(-area.numerator // area.denominator) - 1) + 1 if area > 0 else 0


def parse_patch(text: str, image_size: Size) -> Size:
    """``"3%"`` (share of the area, a square), ``"39"`` (square) or ``"39x20"`` (height x width) -> (height, width).

    Raises ConfigError for anything else, and for a patch that is empty or larger than the image.
    """
    try:
        if text.strip().endswith("%"):
            if len(text) > 20 or "e" in text.lower():  # 1e9000% would be computed to the last digit
                raise ValueError
            percent = Fraction(text.strip()[:-1])
            size = (patch_side(percent, image_size),) * 2
        else:
            sides = [int(side) for side in text.lower().split("x")]
            size = (sides[0], sides[-1])
            if len(sides) > 2:
                raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"patch {text!r}: expected '3%' of the area, '39' or '39x20' pixels (height x width)") from None
    _check_patch(size, image_size, shown=text)
    return size


def _check_patch(patch_size: Size, image_size: Size, *, shown: str) -> None:
    if min(patch_size) < 1:
        raise ConfigError(f"patch {shown!r}: expected at least 1 pixel on each side, found {by(patch_size)}")
    if patch_size[0] > image_size[0] or patch_size[1] > image_size[1]:
        raise ConfigError(f"patch {shown!r}: {by(patch_size)} pixels do not fit into an image of {by(image_size)}; choose a smaller patch")


def by(size: Size) -> str:
    """(39, 20) -> ``39x20``: height x width, as it is typed."""
    return f"{size[0]}x{size[1]}"


@dataclass(frozen=True)
class MaskSet:
    """Masks such that every patch of ``patch_size`` is covered by at least one of them.

    Attributes:
        image_size, patch_size: (height, width) in pixels.
        masks_per_axis: k as asked for, an upper bound; 0 where the set is not a grid.
        windows: for each mask the tuple of rectangles that it hides.
        grid: for a grid, the number of mask rows and columns (row-major order), else None.
    """

    image_size: Size
    patch_size: Size
    masks_per_axis: int
    windows: tuple[tuple[Window, ...], ...]
    grid: Size | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Refuse what would make "every patch is covered" hold of nothing, or mean other pixels than it says."""
        if min(self.image_size) < 1:
            raise ConfigError(f"image size {by(self.image_size)}: expected at least 1x1 pixels")
        _check_patch(self.patch_size, self.image_size, shown=by(self.patch_size))
        for window in (window for mask in self.windows for window in mask):
            if min(window.top, window.left, window.height, window.width) < 0:
                raise ConfigError(f"masks: expected windows with nothing negative, found {window}")

    @classmethod
    def covering(cls, *, image_size: Size, patch_size: Size, masks_per_axis: int) -> MaskSet:
        """The R-covering set of PatchCleanser: the product of :func:`axis_starts` of both axes, row by row.

        Raises ConfigError for sizes that are not positive, a patch larger than the image, or a
        ``masks_per_axis`` below 1 or above the number of patch positions on an axis.
        """
        _check_patch(patch_size, image_size, shown=by(patch_size))
        most = max(n - p + 1 for n, p in zip(image_size, patch_size, strict=True))
        if not 1 <= masks_per_axis <= most:
            raise ConfigError(
                f"masks per axis {masks_per_axis}: expected 1 to {most}, the positions on an axis of a patch of {by(patch_size)} in an image of "
                f"{by(image_size)}; choose a smaller patch or --masks-per-axis"
            )
        (height, tops), (width, lefts) = (
            axis_starts(n, p, min(masks_per_axis, n - p + 1)) for n, p in zip(image_size, patch_size, strict=True)
        )
        windows = tuple((Window(top, left, height, width),) for top, left in product(tops, lefts))
        return cls(image_size, patch_size, masks_per_axis, windows, grid=(len(tops), len(lefts)))

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
    def name(self) -> str:
        """``39x39-k6``: the folder of its records where there are several."""
        return f"{by(self.patch_size)}-k{self.masks_per_axis}"

    def to_json(self) -> dict[str, Any]:
        """The set as a manifest states it: sizes, and each mask's windows as [top, left, height, width]."""
        return {
            "patch_size": self.patch_size,
            "image_size": self.image_size,
            "masks_per_axis": self.masks_per_axis,
            "windows": [[[w.top, w.left, w.height, w.width] for w in mask] for mask in self.windows],
        }

    def coarsen(self) -> tuple[MaskSet, tuple[tuple[int, ...], ...]]:
        """The coarse set: each mask is the union of a 2x2 block of neighbouring masks of this grid.

        Returns the coarse set and, for each coarse mask, the indices of its (4) children here. Where the number
        of starts is odd, the last block overlaps its neighbour, so every fine mask lies in a coarse one and the
        coarse set covers whatever this one does. Neighbours touch or overlap, so the union is a rectangle.

        Raises ConfigError for a set that is not a grid.
        """
        if self.grid is None:
            raise ConfigError("only a grid of masks can be coarsened; build it with MaskSet.covering")
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

    def uncovered_patch(self, patch_size: Size) -> Window | None:
        """A patch position that no mask covers, or None if the set covers: exact, every position is tried.

        A mask covers a patch if it hides each of its pixels, be it with several windows.
        """
        (h, w), (height, width) = patch_size, self.image_size
        _check_patch(patch_size, self.image_size, shown=by(patch_size))
        covered = np.zeros((height - h + 1, width - w + 1), dtype=bool)
        for mask in self.windows:
            visible = np.ones((height, width), dtype=np.int32)
            for win in mask:
                visible[win.top : win.top + win.height, win.left : win.left + win.width] = 0
            # Summed-area table: the number of visible pixels in each h x w box.
            total = np.zeros((height + 1, width + 1), dtype=np.int32)
            total[1:, 1:] = visible.cumsum(0).cumsum(1)
            covered |= total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w] == 0
        if covered.all():
            return None
        top, left = np.argwhere(~covered)[0]
        return Window(int(top), int(left), h, w)


def _pairs(n: int) -> list[tuple[int, ...]]:
    """Blocks of two neighbours out of ``n``; the last overlaps where ``n`` is odd: 5 -> (0,1) (2,3) (3,4)."""
    if n == 1:
        return [(0,)]
    return [(start, start + 1) for start in sorted({*range(0, n - 1, 2), n - 2})]
