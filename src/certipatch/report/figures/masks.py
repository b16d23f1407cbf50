"""What each strategy masks, on one image: a figure of the width of a page.

Which pair of masks a search takes depends on the model, so a search is drawn only where there is a model;
from records alone the geometry of the masks is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle as RectangleArtist

from ...geometry.masks import MaskSet
from ...geometry.patch import Size, Window
from .style import PAGE, STYLE, new_figure

ACROSS = 8  # panels
NEUTRAL = np.full((1, 1, 3), 235, np.uint8)


@dataclass(frozen=True)
class Panel:
    """One masked copy of the image.

    Attributes:
        hidden: its masks, which may reach beyond the image.
        others: masks that are outlined only.
    """

    title: str
    hidden: tuple[Window, ...] = ()
    others: tuple[Window, ...] = ()


def panels_of(copies: Mapping[str, Sequence[Sequence[Window]]]) -> list[Panel]:
    """The panels of what each strategy hides: its copies, each with its windows."""
    return [
        Panel(f"{name}\n{f'copy {number} of {len(each)}' if len(each) > 1 else ''}", tuple(windows))
        for name, each in copies.items()
        for number, windows in enumerate(each, start=1)
    ]


def geometry(masks: MaskSet) -> list[Panel]:
    """What can be shown without a model.

    That is: the sets that searches choose from, and one draw of each strategy that takes masks at random.
    """
    coarse, _ = masks.coarsen()
    (height, width), (h, w) = masks.image_size, masks.patch_size
    rng = np.random.default_rng(0)

    def pair(of: MaskSet) -> tuple[Window, ...]:
        return tuple(of.windows[i][0] for i in rng.integers(len(of), size=2))

    square = round(height * 128 / 224), round(width * 128 / 224)
    squares = tuple(
        Window(int(rng.integers(height)) - square[0] // 2, int(rng.integers(width)) - square[1] // 2, *square)
        for _ in range(2)
    )
    return [
        Panel(f"a patch\n{h}x{w} of {height}x{width}", (Window((height - h) // 2, (width - w) // 2, h, w),)),
        Panel(f"fine set\n{len(masks)} masks", masks.windows[0], tuple(mask[0] for mask in masks.windows)),
        Panel(
            f"coarse set\n{len(coarse)} masks", coarse.windows[0], tuple(mask[0] for mask in coarse.windows)
        ),
        Panel("random-cutout\n", squares),
        Panel("random-coarse\n", pair(coarse)),
        Panel("random-fine\n", pair(masks)),
        Panel("random-both\ncopy 1 of 2", pair(coarse)),
        Panel("random-both\ncopy 2 of 2", pair(masks)),
    ]


def draw_panels(image: np.ndarray | None, size: Size, panels: list[Panel], caption: str = "") -> Figure:
    """The panels in reading order, on an image (3, H, W) uint8 of that ``size``, or on none."""
    rows, (height, width) = -(-len(panels) // ACROSS), size
    pixels = NEUTRAL if image is None else image.transpose(1, 2, 0)
    with mpl.rc_context(STYLE):
        each = PAGE / ACROSS
        figure = new_figure(PAGE, rows * (each * height / width + 0.3) + (0.18 if caption else 0))
        for place, axes in enumerate(figure.subplots(rows, ACROSS, squeeze=False).flat):
            axes.set_axis_off()
            if place >= len(panels):
                continue
            axes.imshow(pixels, extent=(0, width, height, 0), interpolation="none")
            _draw_windows(axes, panels[place], size)
        if caption:
            figure.supxlabel(caption, fontsize=7)
    return figure


def _draw_windows(axes: Axes, panel: Panel, size: Size) -> None:
    """The masks of a panel, and a frame around the image."""
    height, width = size
    for window in panel.others:
        axes.add_patch(_rectangle(window, fill=False, edgecolor="0.5", linewidth=0.4))
    for window in panel.hidden:
        axes.add_patch(_rectangle(window, facecolor="0.6", edgecolor="black", linewidth=0.5))
    frame = Window(0, 0, height, width)
    axes.add_patch(_rectangle(frame, fill=False, edgecolor="0.5", linewidth=0.5, clip_on=False))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_title(panel.title, fontsize=6.5, pad=2)


def _rectangle(window: Window, **look: Any) -> RectangleArtist:
    return RectangleArtist((window.left, window.top), window.width, window.height, **look)
