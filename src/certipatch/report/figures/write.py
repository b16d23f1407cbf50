"""The figures of a report, into a folder. Torch is loaded where pixels or a model are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ...certification.restore import as_certified
from ...errors import ConfigError
from ...geometry.masks import MaskSet
from ...geometry.patch import by, threat_of
from ...records.read import read_records
from ..certification import Summary
from .masks import draw_panels, geometry, panels_of
from .paper import draw_comparisons
from .style import save


@dataclass(frozen=True)
class Place:
    """Where the images of a certification are, as in ``certify``; None: as its manifest says."""

    data: str | None = None
    split: str | None = None
    class_map: str | None = None


def write_figures(
    folder: Path, summaries: list[Summary], *, model: Path | None = None, place: Place | None = None
) -> tuple[list[Path], list[str]]:
    """Write what can be drawn into ``folder``.

    Args:
        model: the training run that was certified: its searches are drawn on one image. Without it, the
            geometry of the masks.
        place: draw the masks on an image from there; None and no model: on none.

    Returns:
        The files, and a line for whatever could not be drawn.
    """
    if folder == Path() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            f"figures '{'' if folder == Path() else folder}': expected a folder to write, found "
            f"{'no name' if folder == Path() else 'a file'}"
        )
    if not summaries:
        raise ConfigError("figures: expected a folder that certify wrote, found none")
    figures, notes = draw_comparisons(summaries)
    stated = [(summary, summary.manifest["experiment"]["masks"]) for summary in summaries]
    trainable = [
        summary
        for summary, masks in stated
        if set(threat_of(masks)) == {"patch_size"} and masks["masks_per_axis"]
    ]
    if trainable:
        if model:
            figures["masks"], left_out = _masks_found(trainable, model, place or Place())
            if left_out:
                notes.append(
                    f"masks: without {', '.join(left_out)}, which find no feature map of the model to look at"
                )
        else:
            figures["masks"] = _geometry(trainable[0], place)
            notes.append(
                "masks: drawn at random; --model RUN draws what each search finds"
                + ("" if place else ", --data on an image")
            )
    else:
        notes.append("skipped masks: needs a certification against one patch of one shape, which train takes")
    return save(figures, folder), notes


def _geometry(summary: Summary, place: Place | None) -> Figure:
    stated = summary.manifest["experiment"]["masks"]
    size = tuple(stated["image_size"])
    masks = MaskSet.covering(**threat_of(stated), image_size=size, masks_per_axis=stated["masks_per_axis"])
    image = None
    if place:
        from ..page.pictures import images_of

        images = images_of(summary.manifest, place.data, place.split, place.class_map)
        readable = (
            item.pixels for item in map(images.__getitem__, range(len(images))) if item.pixels is not None
        )
        pixels = next(readable, None)
        image = None if pixels is None else pixels.numpy()
    blank = "" if image is not None else ", on a blank image"
    caption = f"Masks against patches of {by(masks.patch_size)}, k={masks.masks_per_axis}{blank}; squares and pairs drawn at random. What a search takes depends on the model."
    return draw_panels(image, masks.image_size, geometry(masks), caption)


def _masks_found(summaries: list[Summary], model: Path, place: Place) -> tuple[Figure, list[str]]:
    """What each strategy finds with the certified model on the first image that it is right about, and the
    strategies that cannot."""
    import torch

    from ...data.source import as_float
    from ...models.runs import load_run
    from ...models.weights import weights_sha256
    from ...training.strategies import STRATEGIES, on_one_image
    from ...views.masked import find_mean
    from ..page.pictures import images_of

    spec, network, _ = load_run(model)
    weights = weights_sha256(network)
    of_model = [
        summary for summary in summaries if summary.manifest["experiment"]["weights_sha256"] == weights
    ]
    summary = (of_model or summaries)[0]
    masks, _ = as_certified(Path(summary.folder), spec, network)
    images = images_of(summary.manifest, place.data, place.split, place.class_map)
    record = next(
        (record for record in read_records(Path(summary.folder)) if record.vanilla_label == record.label),
        None,
    )
    item = images[record.index] if record else None
    if item is None or item.pixels is None:
        raise ConfigError(
            f"model {model}: expected an image that it is right about in {summary.folder}, found none; "
            "leave out --model"
        )
    found = dict(
        on_one_image(
            network.eval(), as_float(item.pixels), item.label, masks, fill=torch.as_tensor(find_mean(network))
        )
    )
    caption = f"What each strategy hides from one image, against patches of {by(masks.patch_size)}, k={masks.masks_per_axis}."
    return draw_panels(item.pixels.numpy(), masks.image_size, panels_of(found), caption), [
        name for name in STRATEGIES if name not in found
    ]
