"""Check a folder of records from what it says, with code of its own.

Nothing here uses the mask geometry, the algorithms or the schedule of the library: coverage is tried position
by position on arrays of bool (``verify_geometry``), and images are looked at again one view at a time by a
naive restatement of PatchCleanser's Algorithms 1 and 2 and of challenger masking (``verify_views``), or of
detection (``verify_detection``). What is found wrong is a list of :class:`Finding`; an untouched folder has
none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..config import differences
from ..data.source import Source
from ..models.weights import weights_sha256
from .findings import Given, Verification
from .folder import KINDS, _check_images, _manifests, _records
from .geometry import _check_geometry
from .record import _check_record, _is_certified
from .views import look_again


def verify(
    folder: Path,
    *,
    model: Given | None = None,
    source: Source | None = None,
    sample: int | None = 20,
    seed: int = 0,
    device: str = "auto",
) -> Verification:
    """Check the records that ``certify`` or ``detect`` wrote into ``folder``.

    Args:
        model, source: the model and the whole data set that were given to ``certify``, to be compared with
            what the folder says.
        sample: with model and source: how many images to look at again, drawn with ``seed``; None for all.

    Raises:
        CertiPatchError: the stated precision is none, or the model cannot be run.
    """
    found = Verification(str(folder))
    manifests = dict(_manifests(folder, found))
    if not manifests:
        return found
    experiment, found.kind = (next(iter(manifests.values()))[key] for key in ("experiment", "kind"))
    for path, manifest in manifests.items():
        if manifest["kind"] != found.kind:
            found.add(path.name, f"is of {manifest['kind']}, its neighbour of {found.kind}")
        for difference in differences(manifest["experiment"], experiment)[:3]:
            found.add(path.name, f"is of another experiment than its neighbour ({difference})")
    entries, _ = KINDS[found.kind]
    optional = {"inference"} if found.kind == "certify" else set()
    if odd := sorted(entries ^ (set(experiment) - optional)):
        found.add(
            "manifest", f"its experiment has other entries than those of a certification: {', '.join(odd)}"
        )
        return found
    try:
        sound = _check_geometry(experiment, found)
        records = _records(manifests, found)
        consistent = [
            index for index, record in records.items() if _check_record(index, record, experiment, found)
        ]
        found.images, found.certified = len(records), sum(map(_is_certified, records.values()))
        _check_images(records, experiment, found)
        if model is not None:
            check_given_model(experiment, model, found)
        if source is not None:
            source = source.first(experiment["data"]["images"])
            for difference in differences(experiment["data"], source.describe())[:3]:
                found.add("manifest", f"is of other data than was given: data.{difference}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        found.add("manifest", f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:100]})")
        return found
    if model is not None and source is not None and sound:
        chosen = sorted(index for index in consistent if index < len(source))
        if sample is not None and sample < len(chosen):
            chosen = sorted(np.random.default_rng(seed).choice(chosen, size=sample, replace=False).tolist())
        look_again(chosen, records, experiment, model, source, device, found)
    return found


def check_given_model(experiment: dict[str, Any], model: Given, found: Verification) -> None:
    spec, network, trained = model
    for difference in differences(experiment["model"], spec.model_dump(mode="json"))[:3]:
        found.add("manifest", f"is of another model than was given: model.{difference}")
    if (here := weights_sha256(network)) != experiment["weights_sha256"]:
        found.add(
            "manifest",
            f"is of other weights than were given: sha256 {str(experiment['weights_sha256'])[:12]}... "
            f"there, {here[:12]}... here",
        )
    for difference in differences(experiment["trained"], trained)[:3]:
        found.add(
            "manifest",
            "is of another training than was given: "
            f"trained{'.' if difference[0] != ':' else ''}{difference}",
        )
