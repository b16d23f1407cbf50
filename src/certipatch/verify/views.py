"""Images looked at again: every view by itself, compared with the record by the restatement of its defense.

Nothing here comes from the library's ``views`` or ``defenses``, whose labels and margins are checked by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..data.source import Images, Item, Source
from ..runtime.devices import make_fabric
from ..runtime.progress import progress_bar
from .findings import Experiment, Given, Record, Verification, place
from .restatement import Sighting

# Logits of one view, computed in another batch, differ by less (docs/trust.md has the measurement).
TOLERANCE = {"32-true": 1e-3}
LOW_PRECISION = 0.25  # in any other precision


def look_again(
    records: dict[int, Record],
    experiment: Experiment,
    compare: Callable[[Sighting], None],
    *,
    model: Given,
    source: Source,
    device: str,
    found: Verification,
) -> None:
    """Look at the images of these records again, by their index in the source.

    Raises CertiPatchError if the stated precision is none, or the model cannot be run.
    """
    fabric = make_fabric(device=device, precision=experiment["precision"])
    tolerance = TOLERANCE.get(experiment["precision"], LOW_PRECISION)
    images, function = Images(source, model.spec), fabric.setup_module(model.network).eval()

    def logits(view: Tensor) -> np.ndarray:
        answer: np.ndarray = function(view[None].to(fabric.device))[0].float().cpu().numpy()
        return answer

    with torch.inference_mode(), progress_bar(len(records), "verify") as progress:
        for index, record in records.items():
            progress.advance(1, f"{len(found.findings)} findings")
            found.recomputed += 1
            item = images[index]
            where = place(index, item.name)
            if (item.name, item.label) != (record["name"], record["label"]):
                found.add(where, _other_name(item, record))
            mismatch = _mismatch(item, record)
            if mismatch is not None:
                found.add(where, mismatch)
            elif item.pixels is not None:
                sighting = Sighting(record, experiment, item.pixels.float() / 255, logits, tolerance)
                compare(sighting)
                _tell(sighting, where, found)


def _other_name(item: Item, record: Record) -> str:
    stated = f"the record has {record['name']!r} with label {record['label']!r}"
    return f"{stated}, the data label {item.label}"


def _mismatch(item: Item, record: Record) -> str | None:
    """Why the record cannot be about this image: only one of them was readable, or the pixels are others."""
    error = record["error"]
    if item.pixels is None:
        return f"cannot be read ({item.error}), and the record does not say so" if error is None else None
    if error is not None:
        return f"can be read, the record says {error!r}"
    if hashlib.sha256(item.pixels.numpy().tobytes()).hexdigest() != record["pixels"]:
        return "its pixels are not those that were certified (sha256)"
    return None


def _tell(sighting: Sighting, where: str, found: Verification) -> None:
    """Make every sure difference a finding; if there are only others, rounding leaves the image undecided."""
    sure = [what for what, surely in sighting.differences if surely]
    for what in sure:
        found.add(where, what)
    found.undecided += bool(sighting.differences) and not sure
