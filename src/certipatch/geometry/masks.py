"""Mask sets that cover every position of an adversarial patch.

Source: PatchCleanser (Xiang, Mahloujifar, Mittal; USENIX Security 2022), section 3.2 "R-covering mask set",
and its code for several shapes and two patches (misc/pc_multiple.py); the coarse set of Multi-size Greedy
Cutout: Greedy Cutout, section 3.

Everything here is geometry on integers. A *patch* is the attacker's region, a *mask* the defender's. Whether
masks cover is not taken from how they were made: ``coverage.py`` tries every place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations, permutations, product
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .coverage import Mask, uncovered_patch, uncovered_patches
from .patch import Size, Threat, Window, by, check_patch, fits_into, size_of, whole

if TYPE_CHECKING:
    import torch

MOST_MASKS = 10_000  # of a set; already half of them need a million times the passes of one look at an image
MOST_SHAPES = 100  # that a patch may have

MaskPair = tuple[int, int]  # the numbers i <= j of two masks of a set; i = j: a single mask


def axis_starts(n: int, p: int, k: int) -> tuple[int, list[int]]:
    """Mask side and mask starts on one axis of ``n`` pixels, patch side ``p``, at most ``k`` masks.

    Stride ``s = ceil((n-p+1)/k)``, side ``m = min(p+s-1, n)``, starts ``0, s, 2s, ...`` and ``n-m`` itself.
    Two neighbouring starts differ by at most ``s``, so each of the ``n-p+1`` patch positions lies within a
    mask.

    >>> axis_starts(224, 39, 3)
    (100, [0, 62, 124])
    """
    n, p, k = whole(n, "axis"), whole(p, "patch size"), whole(k, "masks per axis")
    s = -(-(n - p + 1) // k)
    m = min(p + s - 1, n)
    return m, sorted({*range(0, n - m + 1, s), n - m})


@dataclass(frozen=True)
class MaskSet:
    """Masks such that whatever the attacker places is covered by at least one of them.

    The attacker has one patch of ``patch_size``, or of one of the ``other_patch_sizes``; or ``patches`` of
    them at once, which one mask has to cover together.

    Attributes:
        image_size, patch_size: (height, width) in pixels.
        masks_per_axis: k as asked for, an upper bound; 0 for masks that were not made from a k.
        windows: for each mask the tuple of rectangles that it hides.
        grid: the number of mask rows and columns, in row-major order, of a set for one patch of one shape;
            None for any other set.
        other_patch_sizes: further shapes, (height, width) each.
        patches: 1, or 2 for two patches, of any of the shapes each; they may overlap.
    """

    image_size: Size
    patch_size: Size
    masks_per_axis: int
    windows: tuple[Mask, ...]
    grid: Size | None = field(default=None, compare=False)
    other_patch_sizes: tuple[Size, ...] = ()
    patches: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes of which "every patch is covered" would be an empty promise, and negative windows.

        numpy reads a negative index from the far end, so such a window would hide other pixels than it says.
        Numbers of other types than int are taken as int, so that proof and pixels are of the same numbers.
        """
        object.__setattr__(self, "image_size", size_of(self.image_size, "image size"))
        for name, value in vars(Threat(self.patch_size, self.other_patch_sizes, self.patches)).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "masks_per_axis", whole(self.masks_per_axis, "masks per axis"))
        object.__setattr__(self, "windows", tuple(map(tuple, self.windows)))
        if min(self.image_size) < 1:
            raise ConfigError(f"image size {by(self.image_size)}: expected at least 1x1 pixels")
        for size in self.patch_sizes:
            check_patch(size, self.image_size, shown=by(size))
        for window in chain.from_iterable(self.windows):
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
        """The R-covering set of PatchCleanser: the product of both axes'
        :func:`~certipatch.geometry.masks.axis_starts`, row by row.

        Of several shapes it is the union of each one's set, the tallest shape first. For two patches a mask
        is the union of two different masks of the set for one. (PatchCleanser's code has each mask united
        with itself as well. Those hide nothing that is not hidden by another, so without them the set covers
        as much, costs less and demands less of a certificate.)

        Raises ConfigError for sizes that are not positive, a patch larger than the image, a
        ``masks_per_axis`` below 1 or above the number of patch positions on an axis, a shape that fits into
        another, or other than 1 or 2 patches.
        """
        image_size, k = size_of(image_size, "image size"), whole(masks_per_axis, "masks per axis")
        sizes = sorted(
            {size_of(size, "patch size") for size in (patch_size, *other_patch_sizes)}, reverse=True
        )
        if len(sizes) > MOST_SHAPES:
            raise ConfigError(f"patch: expected at most {MOST_SHAPES} shapes, found {len(sizes)}")
        _refuse_nested(sizes)
        grids = [_grid(image_size, size, k) for size in sizes]
        all_windows = chain.from_iterable(windows for windows, _ in grids)
        masks: tuple[Mask, ...] = tuple((window,) for window in dict.fromkeys(all_windows))
        _refuse_many(len(masks) * (len(masks) - 1) // 2 if patches == 2 else len(masks), masks_per_axis)
        return cls(
            image_size,
            sizes[0],
            k,
            windows=_unions_of_two(masks) if patches == 2 else masks,
            grid=grids[0][1] if len(sizes) == patches == 1 else None,
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
    def threat(self) -> Threat:
        """What the attacker may place, which the masks are made to cover."""
        return Threat(self.patch_size, self.other_patch_sizes, self.patches)

    @property
    def name(self) -> str:
        """``39x39-k6``, ``39x20+20x39-k6`` or ``2-patches-20x20-k3``.

        This names the folder of the set's records where one command certifies with several sets.
        """
        return f"{self.threat.file_name}-k{self.masks_per_axis}"

    def to_json(self) -> dict[str, Any]:
        """The set as a manifest states it: its threat, and of each mask the windows.

        A window is written as [top, left, height, width].
        """
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
        row_blocks, column_blocks = _blocks_of_two(rows), _blocks_of_two(columns)
        children = tuple(
            tuple(r * columns + c for r, c in product(row_block, column_block))
            for row_block, column_block in product(row_blocks, column_blocks)
        )
        windows = tuple((_hull(self.windows[block[0]][0], self.windows[block[-1]][0]),) for block in children)
        grid = (len(row_blocks), len(column_blocks))
        return MaskSet(self.image_size, self.patch_size, 0, windows, grid=grid), children

    def uncovered_patches(self) -> tuple[Window, ...] | None:
        """Patches that the attacker may place and no mask covers, or None if the set covers.

        The answer is exact, for every place is tried. Two patches are covered by a mask that hides both.
        """
        return uncovered_patches(self.windows, self.image_size, self.threat)

    def uncovered_patch(self, patch_size: Size) -> Window | None:
        """A place of one patch of this size that no mask covers, or None if the set covers each place.

        The answer is exact, for every place is tried. A mask covers a patch if it hides each of its pixels,
        be it with several windows.
        """
        return uncovered_patch(self.windows, self.image_size, patch_size)


def _refuse_nested(sizes: Sequence[Size]) -> None:
    for small, large in permutations(sizes, 2):
        if fits_into(small, large):
            raise ConfigError(
                f"patch {by(small)}: fits into {by(large)}, whose masks cover it; drop it, or certify "
                "for each (with a comma)"
            )


def _grid(image_size: Size, patch_size: Size, masks_per_axis: int) -> tuple[list[Window], Size]:
    """The windows of the R-covering set of one shape, and the number of their rows and columns."""
    check_patch(patch_size, image_size, shown=by(patch_size))
    places = [n - p + 1 for n, p in zip(image_size, patch_size, strict=True)]
    if not 1 <= masks_per_axis <= max(places):
        raise ConfigError(
            f"masks per axis {masks_per_axis}: expected 1 to {max(places)}, the positions on an axis of a "
            f"patch of {by(patch_size)} in an image of {by(image_size)}; choose a smaller patch or "
            "--masks-per-axis"
        )
    (height, tops), (width, lefts) = (
        axis_starts(n, p, min(masks_per_axis, most))
        for n, p, most in zip(image_size, patch_size, places, strict=True)
    )
    _refuse_many(len(tops) * len(lefts), masks_per_axis)
    return [Window(top, left, height, width) for top, left in product(tops, lefts)], (len(tops), len(lefts))


def _refuse_many(masks: int, masks_per_axis: int) -> None:
    if masks > MOST_MASKS:
        raise ConfigError(
            f"masks per axis {masks_per_axis}: expected at most {MOST_MASKS} masks in all, found {masks}; "
            "choose a smaller --masks-per-axis"
        )


def _unions_of_two(masks: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """The union of every two different masks; of a single mask, which covers everything, that mask."""
    return tuple(one + other for one, other in combinations(masks, 2)) or masks


def _blocks_of_two(n: int) -> list[tuple[int, ...]]:
    """Blocks of two neighbours out of ``n``; the last overlaps where ``n`` is odd: 5 -> (0,1) (2,3) (3,4)."""
    if n == 1:
        return [(0,)]
    return [(start, start + 1) for start in sorted({*range(0, n - 1, 2), n - 2})]


def _hull(first: Window, last: Window) -> Window:
    """The smallest rectangle that holds both windows; ``last`` is not above or left of ``first``."""
    return Window(
        first.top,
        first.left,
        last.top + last.height - first.top,
        last.left + last.width - first.left,
    )
