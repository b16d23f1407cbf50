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
from ..runtime.devices import autocast, make_fabric
from ..runtime.progress import progress_bar
from .findings import Experiment, Given, Record, Verification, place
from .restatement import Sighting

# Margins of one view, computed in another batch, differ by no more (docs/trust.md has the measurement).
TOLERANCE = {"32-true": 1e-3, "16-mixed": 2**-8, "bf16-mixed": 2**-5}

# The share of the largest logit (of 1 where all are smaller) by which rounding moves a margin at most.
MOST_MOVED = {"32-true": 1e-3, "16-mixed": 0.01, "bf16-mixed": 0.05}


def look_again(
    records: dict[int, Record],
    experiment: Experiment,
    compare: Callable[[Sighting], None],
    *,
    model: Given,
    source: Source,
    device: str,
    tolerance: float = 0.0,
    found: Verification,
) -> None:
    """Look at the images of these records again, by their index in the source.

    ``tolerance``: how far logits of a probe were seen to move by rounding before it was certified, compiled
    or not. Other views may move twice as far, which leaves them undecided.

    Raises CertiPatchError if the stated precision is none, or the model cannot be run.
    """
    fabric = make_fabric(device=device, precision=experiment["precision"])
    images, function = Images(source, model.spec), model.network.to(fabric.device).eval()

    def batch(views: Tensor) -> np.ndarray:
        with autocast(experiment["precision"], fabric.device):  # Fabric's own module rounds otherwise in bf16
            answer: np.ndarray = function(views.to(fabric.device)).float().cpu().numpy()
        return answer

    def logits(view: Tensor) -> np.ndarray:
        answer: np.ndarray = batch(view[None])[0]
        return answer

    with torch.inference_mode(), progress_bar(len(records), "verify") as progress:
        moved, limit, margin = _movement(batch, model.spec.image_size, MOST_MOVED[experiment["precision"]])
        if not moved <= limit:
            what = f"its answer to a view moves by {moved:.2g} logits with what else is in the batch"
            found.add("model", what)
        tolerance = max(TOLERANCE[experiment["precision"]], margin, 2 * tolerance)
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
                image = item.pixels.float() / 255
                sighting = Sighting(record, experiment, image, logits, tolerance, function)
                compare(sighting)
                _tell(sighting, where, found)


def _movement(
    batch: Callable[[Tensor], np.ndarray], image_size: tuple[int, int], most: float
) -> tuple[float, float, float]:
    """How far differences of logits of a view of noise move with its company, how far rounding may move them,
    and how far its margin moves.

    The view is shown alone, a second time, and first and last among black, white and other noise.
    """
    noise = torch.from_numpy(np.random.default_rng(7).random((2, 3, *image_size), dtype=np.float32))
    view, others = noise[:1], torch.cat([noise[1:], torch.zeros_like(noise[:1]), torch.ones_like(noise)])
    alone = batch(view)[0].astype(np.float64)
    seen = [batch(view)[0], batch(torch.cat([view, others]))[0], batch(torch.cat([others, view]))[-1]]
    changes = [np.where(other == alone, 0.0, other - alone) for other in seen]
    moved = max(float(np.nan_to_num(np.ptp(change), nan=np.inf)) for change in changes)
    margins = [float(np.subtract(*np.sort(logits)[:-3:-1])) for logits in (alone, *seen)]
    return moved, most * max(1.0, float(np.abs(alone).max())), max(margins) - min(margins)


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
