"""Windows of limited sight: of each, the rectangles of the image that it shows; all other pixels are hidden.

Sources: bands and blocks that go on at the opposite border are those of De-randomized Smoothing (Levine and
Feizi, NeurIPS 2020), cells those of a BagNet (Brendel and Bethge, ICLR 2019). What a patch can reach of them
is in ``reach.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise, product

from ..errors import ConfigError
from .coverage import Mask
from .patch import Size, Window, by

Sight = tuple[Window, ...]  # the rectangles that one window shows


def columns(image_size: Size, width: int, stride: int = 1) -> tuple[Sight, ...]:
    """Bands of ``width`` pixel columns that start at 0, stride, 2 stride ...

    A band that meets the right border goes on at the left one. Where the stride does not divide the image,
    the last start is nearer to the first than the stride says.

    Raises ConfigError for a band wider than the image, or strides that leave a gap between bands.
    """
    height, n = image_size
    _check("columns", image_size, width, n, stride)
    return tuple(
        tuple(Window(0, left, height, some) for left, some in _pieces(start, width, n))
        for start in range(0, n, stride)
    )


def blocks(image_size: Size, side: int, stride: int = 1) -> tuple[Sight, ...]:
    """Squares whose corners lie at 0, stride, 2 stride ... on both axes, row by row; they go on at the
    opposite borders.

    Raises ConfigError for a square larger than the image, or strides that leave a gap between squares.
    """
    height, width = image_size
    _check("blocks", image_size, side, min(image_size), stride)
    return tuple(
        tuple(
            Window(y, x, h, w)
            for (y, h), (x, w) in product(_pieces(top, side, height), _pieces(left, side, width))
        )
        for top, left in product(range(0, height, stride), range(0, width, stride))
    )


def cells(image_size: Size, field: int, stride: int) -> tuple[Sight, ...]:
    """The squares that lie wholly within the image, row by row: what the cells of a BagNet see.

    Pixels at the right and the lower border are seen by none where the stride does not divide what is left.

    Raises ConfigError for a field larger than the image, or strides that leave a gap between fields.
    """
    _check("cells", image_size, field, min(image_size), stride)
    tops, lefts = (range(0, n - field + 1, stride) for n in image_size)
    return tuple((Window(top, left, field, field),) for top, left in product(tops, lefts))


def sights_of(windows: str, image_size: Size) -> tuple[Sight, ...]:
    """The windows as they are typed: ``columns:4`` (width), ``columns:19/5`` (width/stride), ``blocks:75/10``
    or ``cells:17/8``; without a stride it is 1.

    Raises ConfigError for another text, and for windows that do not fit the image or leave a gap.
    """
    found = re.fullmatch(r"(columns|blocks|cells):(\d{1,5})(?:/(\d{1,5}))?", windows)
    if found is None:
        raise ConfigError(
            f"windows {windows!r}: expected columns:4, columns:19/5 (width/stride), blocks:75/10 or "
            "cells:17/8"
        )
    kinds: dict[str, Callable[[Size, int, int], tuple[Sight, ...]]]
    kinds = {"columns": columns, "blocks": blocks, "cells": cells}
    return kinds[found[1]](image_size, int(found[2]), int(found[3] or 1))


def hidden_by(sight: Sight, image_size: Size) -> Mask:
    """The rectangles of an image that a window does not show, as few as rows of pixels allow; at least one,
    which may be empty.

    Rows that show the same pixels and lie together give one rectangle for each stretch that is hidden.
    """
    height, width = image_size
    edges = sorted({0, height, *(y for shown in sight for y in (shown.top, shown.top + shown.height))})
    found = []
    for top, bottom in pairwise(edges):
        shown = sorted(
            (r.left, r.left + r.width) for r in sight if r.top <= top and bottom <= r.top + r.height
        )
        start = 0
        for left, right in [*shown, (width, width)]:
            if start < left:
                found.append(Window(top, start, bottom - top, left - start))
            start = max(start, right)
    return tuple(found) or (Window(0, 0, 0, 0),)


def _pieces(start: int, side: int, n: int) -> Iterator[tuple[int, int]]:
    """The start and the length of one or two pieces of ``side`` pixels out of ``n`` on a circle."""
    yield start, min(side, n - start)
    if start + side > n:
        yield 0, start + side - n


def _check(kind: str, image_size: Size, side: int, most: int, stride: int) -> None:
    if not 1 <= side <= most:
        raise ConfigError(
            f"windows {kind}:{side}: expected 1 to {most} pixels in an image of {by(image_size)}; choose "
            "smaller windows"
        )
    if not 1 <= stride <= side:
        raise ConfigError(
            f"windows {kind}:{side}/{stride}: expected a stride of 1 to {side} pixels, for others leave "
            "pixels that no window shows; choose a smaller stride"
        )
