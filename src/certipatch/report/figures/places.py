"""Where a sticker can do nothing: the mean map of proven places of certifications by place, as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ...geometry.patch import by
from ..certification import Summary
from ..places import ByPlace
from .style import PAGE, STYLE, new_figure

ACROSS = 4  # maps
COLOURS = "viridis"  # lighter means more, for everybody and in print


def draw_places(groups: Mapping[str, Mapping[str, Summary]]) -> dict[str, Figure]:
    """A figure for each group that has a run by place against one patch at a time.

    Args:
        groups: by the name of the figure, runs against the same patches with the same masks, by the name of
            their model.
    """
    maps = {name: {model: _map(one) for model, one in group.items()} for name, group in groups.items()}
    return {
        name: _draw({model: one for model, one in found.items() if one is not None}, groups[name])
        for name, found in maps.items()
        if any(one is not None for one in found.values())
    }


def _map(summary: Summary) -> np.ndarray | None:
    """(H-h+1, W-w+1) float: the share of images that are proven at each place of the first shape.

    None of a run that was not certified by place, and of two patches, whose pairs of places have no picture.
    """
    found = ByPlace.of(summary.folder, min_margin=summary.min_margin)
    if found is None or found.places.patches != 1:
        return None
    share: np.ndarray = found.mean()[found.places.kinds[0]]
    return share


def _draw(maps: Mapping[str, np.ndarray], summaries: Mapping[str, Summary]) -> Figure:
    """The maps beside each other, in one scale of colours."""
    columns = min(ACROSS, len(maps))
    rows = -(-len(maps) // columns)
    first = next(iter(summaries.values()))
    size, (h, w) = first.experiment.against.image_size, first.threat.patch_sizes[0]
    low = min(float(one.min()) for one in maps.values())
    with mpl.rc_context(STYLE):
        figure = new_figure(PAGE if columns > 1 else PAGE / 2, 0.9 + rows * (1.7 if columns > 2 else 2.6))
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in islice(panels.flat, len(maps), None):
            axes.set_axis_off()
        for axes, (model, one) in zip(panels.flat, maps.items(), strict=False):
            image = _panel(axes, one, (size[0], size[1]), (h, w), low)
            shares = summaries[model].certified_share_of_places
            axes.set_title(f"{model}\n{shares.percent:.1f} % of places" if shares else model)
        bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02)
        bar.set_label("images proven there (%)")
        figure.suptitle(
            f"Centre of a patch of {by((h, w))} in {by((size[0], size[1]))}, "
            f"k={first.experiment.masks_per_axis}, {first.images} images",
            fontsize=8,
        )
    return figure


def _panel(
    axes: Axes, share: np.ndarray, image: tuple[int, int], patch: tuple[int, int], low: float
) -> AxesImage:
    """One map, at the pixels in which the centre of the patch lies; its frame is the image."""
    (height, width), (h, w) = image, patch
    left, top = w / 2 - 0.5, h / 2 - 0.5
    extent = (left, left + share.shape[1], top + share.shape[0], top)
    shown = axes.imshow(100 * share, extent=extent, cmap=COLOURS, vmin=100 * low, vmax=100, aspect="equal")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[0, width], yticks=[0, height])
    return shown
