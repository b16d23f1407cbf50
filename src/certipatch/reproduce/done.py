"""What a folder holds already of the runs of a recipe, and whether it is this recipe's.

A folder of another experiment, or of other weights, is neither shown as this recipe's nor written over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import differences
from ..errors import RecordsError
from ..records.manifest import Manifest, holds_manifest, read_manifest
from ..records.read import Folder, read_folder
from ..records.schema import Record
from .plan import Run


def finished(folder: Path) -> Manifest | None:
    """The manifest of a folder if what it describes is finished, else None."""
    found = read_manifest(folder) if holds_manifest(folder) else None
    return found if found and found.finished else None


def training(run: Run, out: Path) -> Manifest | None:
    """The manifest of a run's training if it is finished in ``out``, else None.

    Raises RecordsError if the folder holds another training, or one that began from another base.
    """
    found = finished(out / run.name)
    if found is None:
        return None
    base = finished(out / run.base) if run.setup.base else None
    start = {"initial_weights_sha256": _weights_of(base)} if base else {}
    _compare(run, found, images=run.train_images, train=run.config.model_dump(mode="json"), **start)
    return found


def certification(run: Run, out: Path, patch: str, masks_per_axis: int) -> Folder[Record] | None:
    """One certification of a run if there is one in ``out``, finished or not, else None.

    Raises RecordsError if the folder holds another certification, or one of other weights than this run's.
    """
    folder, trained = out / run.certified(patch, masks_per_axis), training(run, out)
    if trained is None or not holds_manifest(folder):
        return None
    found = read_folder(folder)
    masks = json.loads(json.dumps(run.masks(patch, masks_per_axis).to_json()))
    weights = _weights_of(trained)
    _compare(run, found.manifest, images=run.test_images, masks=masks, weights_sha256=weights)
    return found


def is_certified(run: Run, out: Path, patch: str, masks_per_axis: int) -> bool:
    """Whether every image of one certification has its record. Raises as :func:`certification`."""
    found = certification(run, out, patch, masks_per_axis)
    return found is not None and len(found.records) == run.test_images


def is_done(run: Run, out: Path) -> bool:
    """Whether a run is trained, and certified against everything. Raises as :func:`certification`."""
    trained = training(run, out) is not None
    return trained and all(is_certified(run, out, *each) for each in run.certifications)


def _weights_of(trained: Manifest) -> Any:
    """The hash of the weights that a finished training ended with; None if its manifest does not say."""
    return (trained.finished or {}).get("weights_sha256")


def _compare(run: Run, manifest: Manifest, *, images: int, **more: Any) -> None:
    """Raise RecordsError if the manifest is of another experiment than the run asks for."""
    crop = {"crop_pct": run.setup.crop_pct} if run.setup.crop_pct else {}
    expected = {
        "model": {"arch": run.arch, "image_size": list(run.setup.size), **crop},
        "precision": run.setup.precision,
        "processes": 1,
        "data": {"images": images},
        **more,
    }
    there = {"processes": 1, **manifest.stated}
    found = {key: _asked_of(there.get(key), value) for key, value in expected.items()}
    differing = differences(found, expected)
    if differing:
        raise RecordsError(
            f"{manifest.folder}: holds another experiment than the recipe's ({'; '.join(differing[:3])}); "
            "choose another --out"
        )


def _asked_of(stated: Any, expected: Any) -> Any:
    """Of what is stated, the entries that are expected to be something."""
    if isinstance(stated, dict) and isinstance(expected, dict):
        return {key: stated.get(key) for key in expected}
    return stated
