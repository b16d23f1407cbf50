"""Networks whose output cells have limited sight: their logits in one pass, and how far each really sees.

How far is measured with NaN and not believed, as the reach of a mask is in ``prefix.py``: every operation up
to the cells must be known to carry NaN on to all that can depend on it, and a NaN that a cell does not see,
by what it says of its sight, must not come out of it. What a convolution of this machine mixes beyond the
receptive field (Winograd's and Fourier's do) comes to light too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SoundnessError, brief
from ..geometry.patch import Size, Window
from ..geometry.sights import Sight
from .prefix import TRIAL_BATCH_SIZE, Watch, refuse_numbers_out_of_sight


class CellLogits(nn.Module):
    """A model up to its cells: images (N, 3, H, W) in [0, 1] -> logits (N, cells, classes).

    The last module of the model has a method ``cells``, and ``sights`` that says what each cell sees of an
    image of some size. Raises ConfigError for a model whose last module has not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        *front, self.network = model if isinstance(model, nn.Sequential) else [model]
        if not all(callable(getattr(self.network, name, None)) for name in ("cells", "sights")):
            raise ConfigError(
                f"model: expected a network with cells and sights, such as small-bagnet, found "
                f"{type(self.network).__name__}; choose columns or blocks as windows of other networks"
            )
        self.front = nn.ModuleList(front)

    def forward(self, images: Tensor) -> Tensor:
        for module in self.front:
            images = module(images)
        cells: Tensor = self.network.cells(images)  # type: ignore[operator]
        return cells

    def sights(self, image_size: Size) -> tuple[Sight, ...]:
        """What each cell says that it sees."""
        found: Any = self.network.sights(image_size)  # type: ignore[operator]
        return tuple(found)


@torch.inference_mode()
def check_sights(cells: nn.Module, sights: Sequence[Sight], image_size: Size) -> None:
    """Refuse a network of which a cell sees more than its sight, or is not known to see no more.

    Along each axis, NaN is put on all pixels before an edge of some sight, and on all behind one. Every pixel
    outside of a cell's rectangle lies above or below it, left or right of it, so a cell that stays a number
    in these four views sees nothing outside.

    Args:
        cells: images (N, 3, H, W) -> (N, cells, classes), in evaluation mode; see :class:`CellLogits`.
        sights: of each cell one rectangle.

    Raises SoundnessError.
    """
    boxes = [_box(sight) for sight in sights]
    parameter = next(cells.parameters(), torch.zeros(()))
    noise = torch.rand(3, *image_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    _refuse_escapes(cells, noise)
    edges = iter(_edges(boxes, image_size))
    while some := list(islice(edges, TRIAL_BATCH_SIZE)):
        views = noise.repeat(len(some), 1, 1, 1)
        for view, hidden in zip(views, some, strict=True):
            view[:, hidden.top : hidden.top + hidden.height, hidden.left : hidden.left + hidden.width] = (
                torch.nan
            )
        for hidden, reached in zip(some, _reached(cells, views, len(sights)), strict=True):
            _refuse_seen(hidden, reached, boxes)


def _refuse_escapes(cells: nn.Module, noise: Tensor) -> None:
    """Raises SoundnessError for a network that takes numbers out of tensors, where NaN is not followed."""
    try:
        refuse_numbers_out_of_sight(cells, noise[None])
    except Exception as error:  # torch raises anything
        raise SoundnessError(
            f"cells: expected a network that computes with torch's tensors alone, found another "
            f"({brief(error)}); what its cells see cannot be measured"
        ) from error


def _box(sight: Sight) -> Window:
    if len(sight) != 1:
        raise SoundnessError(f"sight {sight}: expected one rectangle for a cell, found {len(sight)}")
    (box,) = sight
    return box


def _edges(boxes: Sequence[Window], image_size: Size) -> Iterator[Window]:
    """All pixels above and below, left and right of some box; once each, and none that are no pixels."""
    height, width = image_size
    for top in sorted({box.top for box in boxes} - {0}):
        yield Window(0, 0, top, width)
    for bottom in sorted({box.top + box.height for box in boxes} - {height}):
        yield Window(bottom, 0, height - bottom, width)
    for left in sorted({box.left for box in boxes} - {0}):
        yield Window(0, 0, height, left)
    for right in sorted({box.left + box.width for box in boxes} - {width}):
        yield Window(0, right, height, width - right)


def _reached(cells: nn.Module, views: Tensor, expected: int) -> Tensor:
    """(views, cells) bool: which cells are NaN for some class."""
    with Watch() as watch:  # type: ignore[no-untyped-call]
        logits = cells(views)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (len(views), expected):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SoundnessError(f"cells: expected ({len(views)}, {expected}, classes) logits, found {found}")
    if not watch.carried:
        raise SoundnessError(
            "cells: expected operations that are known to carry NaN on, so that what a cell sees can be "
            "measured, found others; build the network of convolutions, BatchNorm, ReLU and pooling"
        )
    return logits.isnan().any(dim=2)


def _refuse_seen(hidden: Window, reached: Tensor, boxes: Sequence[Window]) -> None:
    for number in reached.nonzero()[:, 0].tolist():
        box = boxes[number]
        if not _meet(hidden, box):
            raise SoundnessError(
                f"cell {number}: expected to see {box.height}x{box.width} pixels at row {box.top}, column "
                f"{box.left}, and no others, found that it sees some of the {hidden.height}x{hidden.width} "
                f"at row {hidden.top}, column {hidden.left}; state the field that the network has"
            )


def _meet(one: Window, other: Window) -> bool:
    return (
        one.top < other.top + other.height
        and other.top < one.top + one.height
        and one.left < other.left + other.width
        and other.left < one.left + one.width
    )
