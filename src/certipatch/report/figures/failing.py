"""Pictures from records, with Matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...records.manifest import read_manifest
from ...records.read import read_records
from ...records.schema import Record

CERTIFIED, WRONG = "#0072b2", "#d55e00"  # blue and vermilion: told apart by colour-blind readers too


def failing_masks(path: Path, images: dict[int, np.ndarray], folders: dict[str, Path]) -> None:
    """A PNG with a row for each image and a column for each certification: the mask pair that the model fails
    on.

    Args:
        images: index in the records -> (3, H, W) uint8.
        folders: column title -> folder of records.
    """
    figure = Figure(figsize=(1.7 * (len(folders) + 1), 1.95 * len(images) + 0.5), layout="constrained")
    axes = figure.subplots(len(images), len(folders) + 1, squeeze=False)
    for row, pixels in enumerate(images.values()):
        _show(axes[row, 0], pixels.transpose(1, 2, 0))
    for column, (title, folder) in enumerate(folders.items(), start=1):
        manifest = read_manifest(folder)["experiment"]
        records = {record.index: record for record in read_records(folder)}
        axes[0, column].set_title(title.replace(", ", ",\n"), fontsize=9)
        for row, (index, pixels) in enumerate(images.items()):
            record = records[index]
            axis = axes[row, column]
            _show(axis, _masked(pixels, record, manifest), CERTIFIED if record.certified else WRONG)
            classes = manifest["model"]["classes"]
            if record.failing_label is None:
                axis.set_xlabel("✓ certified", fontsize=8, color=CERTIFIED)
            else:
                axis.set_xlabel(f"✗ reads {classes[record.failing_label]}", fontsize=8, color=WRONG)
            axes[row, 0].set_xlabel(f"a {classes[record.label]}", fontsize=8)
    axes[0, 0].set_title("image", fontsize=9)
    figure.supxlabel(
        "Grey: the pair of masks under which the model's answer is wrong first; none where certified.",
        fontsize=8,
    )
    figure.savefig(path, dpi=130)


def _masked(pixels: np.ndarray, record: Record, manifest: dict[str, Any]) -> np.ndarray:
    """The image with the failing pair of masks in the fill colour, hatched lightly so that it is seen on any
    image."""
    shown = pixels.transpose(1, 2, 0).copy()
    for mask in record.failing_pair or ():
        for top, left, height, width in manifest["masks"]["windows"][mask]:
            shown[top : top + height, left : left + width] = np.round(
                np.array(manifest["fill"]) * 255
            ).astype(np.uint8)
    return shown


def _show(axis: Any, image: np.ndarray, colour: str = "0.6") -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2 if colour != "0.6" else 0.5)
