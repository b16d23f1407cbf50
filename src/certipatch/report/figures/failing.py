"""A picture of the masks that models fail on, side by side for several certifications."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...records.experiment import Certification
from ...records.read import Folder
from ...records.schema import PatchCleanserRecord

CERTIFIED, WRONG = "#0072b2", "#d55e00"  # blue and vermilion: told apart by colour-blind readers too


def failing_masks(
    path: Path, images: Mapping[int, np.ndarray], folders: Mapping[str, Folder[PatchCleanserRecord]]
) -> None:
    """Write a PNG that shows the mask pair that a model fails on.

    It has a row for each image and a column for each certification.

    Args:
        images: index in the records -> (3, H, W) uint8.
        folders: column title -> certification.
    """
    figure = Figure(figsize=(1.7 * (len(folders) + 1), 1.95 * len(images) + 0.5), layout="constrained")
    axes = figure.subplots(len(images), len(folders) + 1, squeeze=False)
    axes[0, 0].set_title("image", fontsize=9)
    for row, pixels in enumerate(images.values()):
        _show(axes[row, 0], pixels.transpose(1, 2, 0))
    for column, (title, folder) in enumerate(folders.items(), start=1):
        experiment = folder.manifest.certification
        records = {record.index: record for record in folder.records}
        axes[0, column].set_title(title.replace(", ", ",\n"), fontsize=9)
        for row, (index, pixels) in enumerate(images.items()):
            _show_record(axes[row, column], pixels, records[index], experiment)
            axes[row, 0].set_xlabel(f"a {experiment.model.class_names[records[index].label]}", fontsize=8)
    figure.supxlabel(
        "Grey: the pair of masks under which the model's answer is wrong first; none where certified.",
        fontsize=8,
    )
    figure.savefig(path, dpi=130)


def _show_record(
    axis: Any, pixels: np.ndarray, record: PatchCleanserRecord, experiment: Certification
) -> None:
    _show(axis, _masked(pixels, record, experiment), CERTIFIED if record.certified else WRONG)
    if record.failing_label is None:
        axis.set_xlabel("✓ certified", fontsize=8, color=CERTIFIED)
    else:
        wrong = experiment.model.class_names[record.failing_label]
        axis.set_xlabel(f"✗ reads {wrong}", fontsize=8, color=WRONG)


def _masked(pixels: np.ndarray, record: PatchCleanserRecord, experiment: Certification) -> np.ndarray:
    """The image with the failing pair of masks in the fill colour, (H, W, 3)."""
    shown = pixels.transpose(1, 2, 0).copy()
    fill = np.round(np.array(experiment.fill) * 255).astype(np.uint8)
    for mask in record.failing_pair or ():
        for top, left, height, width in experiment.windows[mask]:
            shown[top : top + height, left : left + width] = fill
    return shown


def _show(axis: Any, image: np.ndarray, colour: str = "0.6") -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2 if colour != "0.6" else 0.5)
