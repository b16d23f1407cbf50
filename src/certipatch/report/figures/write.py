"""``certipatch report --figures``: what can be drawn of some certifications, into a folder.

Torch is loaded only where pixels or a model are asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from ...config import DataAsked
from ...errors import ConfigError
from ...geometry.masks import MaskSet
from ...geometry.patch import by
from ..certification import Summary
from ..images import images_of
from .masks import draw_panels, geometry, panels_of
from .paper import draw_comparisons
from .style import save

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def write_figures(
    folder: Path, summaries: list[Summary], *, model: Path | None = None, place: DataAsked | None = None
) -> tuple[list[Path], list[str]]:
    """Write what can be drawn into ``folder``.

    Args:
        model: the training run that was certified: its searches are drawn on one image. Without it, the
            geometry of the masks is drawn.
        place: where there is an image to draw the masks on; None: with a model as the records say, and
            without one no image is drawn on.

    Returns:
        The files, and a line for whatever could not be drawn.
    """
    _check(folder, summaries)
    figures, notes = draw_comparisons(summaries)
    trainable = [summary for summary in summaries if _trainable(summary)]
    if not trainable:
        notes.append("skipped masks: needs a certification against one patch of one shape, which train takes")
    elif model:
        figures["masks"], left_out = _masks_found(trainable, model, place)
        if left_out:
            blind = ", ".join(left_out)
            notes.append(f"masks: without {blind}, which find no feature map of the model to look at")
    else:
        figures["masks"] = _geometry(trainable[0], place)
        on_an_image = "" if place else ", --data on an image"
        notes.append(f"masks: drawn at random; --model RUN draws what each search finds{on_an_image}")
    return save(figures, folder), notes


def _check(folder: Path, summaries: list[Summary]) -> None:
    if folder == Path():
        raise ConfigError("figures '': expected a folder to write, found no name")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"figures '{folder}': expected a folder to write, found a file")
    if not summaries:
        raise ConfigError("figures: expected a folder that certify wrote, found none")


def _trainable(summary: Summary) -> bool:
    """Whether the masks are such as train takes."""
    return summary.threat.is_single and summary.experiment.masks_per_axis > 0


def _geometry(summary: Summary, place: DataAsked | None) -> Figure:
    height, width = summary.experiment.against.image_size
    masks = MaskSet.covering(
        image_size=(height, width),
        masks_per_axis=summary.experiment.masks_per_axis,
        **summary.threat,
    )
    image = _first_readable(summary, place) if place else None
    blank = "" if image is not None else ", on a blank image"
    caption = (
        f"Masks against patches of {by(masks.patch_size)}, k={masks.masks_per_axis}{blank}; squares and "
        "pairs drawn at random. What a search takes depends on the model."
    )
    return draw_panels(image, masks.image_size, geometry(masks), caption)


def _first_readable(summary: Summary, place: DataAsked) -> np.ndarray | None:
    """The first image of the certification that can be read, (3, H, W) uint8."""
    images = images_of(summary.folder.manifest, place)
    items = (images[index] for index in range(len(images)))
    return next((item.pixels.numpy() for item in items if item.pixels is not None), None)


def _masks_found(summaries: list[Summary], model: Path, place: DataAsked | None) -> tuple[Figure, list[str]]:
    """What each strategy finds with the certified model on the first image that it is right about.

    Returns:
        The figure, and the names of the strategies that cannot look at the model.
    """
    import torch

    from ...certification.restore import certified_masks
    from ...data.source import as_float
    from ...models.runs import open_run
    from ...training.strategies import STRATEGIES, on_one_image
    from ...views.masked import find_mean

    opened = open_run(model)
    summary = _of_weights(opened.weights_sha256, summaries)
    masks = certified_masks(summary.folder.manifest, opened)
    pixels, label = _first_right(summary, place, model)
    fill = torch.as_tensor(find_mean(opened.network))
    found = dict(on_one_image(opened.network.eval(), as_float(pixels), label, masks, fill=fill))
    caption = (
        f"What each strategy hides from one image, against patches of {by(masks.patch_size)}, "
        f"k={masks.masks_per_axis}."
    )
    figure = draw_panels(pixels.numpy(), masks.image_size, panels_of(found), caption)
    return figure, [name for name in STRATEGIES if name not in found]


def _of_weights(weights_sha256: str, summaries: list[Summary]) -> Summary:
    """The first certification of these weights; without one the first of all, which says what differs."""
    same = (summary for summary in summaries if summary.experiment.weights_sha256 == weights_sha256)
    return next(same, summaries[0])


def _first_right(summary: Summary, place: DataAsked | None, model: Path) -> tuple[Tensor, int]:
    """The first image that the undefended model is right about, (3, H, W) uint8, and its label."""
    right = (record for record in summary.folder.records if record.vanilla_label == record.label)
    record = next(right, None)
    item = images_of(summary.folder.manifest, place)[record.index] if record else None
    if item is None or item.pixels is None:
        raise ConfigError(
            f"model {model}: expected an image that it is right about in {summary.name}, found none; leave "
            "out --model"
        )
    return item.pixels, item.label
