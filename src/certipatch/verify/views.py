"""Images looked at again: every view by itself, compared with the record by the restatement of its defense.

Nothing here comes from the library's ``views`` or ``defenses``, whose labels and margins are checked by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.source import Images, Item, Source
from ..data.travel import Block, Seen, packed
from ..models.weights import weights_sha256
from ..runtime.devices import autocast, make_fabric
from ..runtime.probe import Facts
from ..runtime.progress import progress_bar
from ..runtime.team import Team, Unseen
from .findings import Experiment, Finding, Given, Record, Verification, place
from .restatement import Sighting

# Margins of one view, computed in another batch, differ by no more (docs/trust.md has the measurement).
TOLERANCE = {"32-true": 1e-3, "16-mixed": 2**-8, "bf16-mixed": 2**-5}

# The share of the largest logit (of 1 where all are smaller) by which rounding moves a margin at most.
MOST_MOVED = {"32-true": 1e-3, "16-mixed": 0.01, "bf16-mixed": 0.05}


Compare = Callable[[Sighting], None]


@dataclass(frozen=True)
class Looked:
    """What was found at one image: findings, and whether rounding leaves it undecided.

    ``unsteady``: what is wrong with the model where it was looked at, the same of each image.
    """

    findings: list[Finding]
    undecided: bool
    unsteady: str | None


class Eyes:
    """A model on a device, which looks at images one view at a time and compares them with their records.

    Raises CertiPatchError if the stated precision is none, or the model cannot be run.
    """

    def __init__(
        self, experiment: Experiment, compare: Compare, model: Given, device: str, tolerance: float
    ) -> None:
        self.experiment, self.compare, self.model = experiment, compare, model
        self.precision = experiment["precision"]
        self.fabric = make_fabric(device=device, precision=self.precision)
        self.function = model.network.to(self.fabric.device).eval()
        most = MOST_MOVED[self.precision]
        with torch.inference_mode():
            moved, limit, margin = _movement(self._batch, model.spec.image_size, most)
        what = f"its answer to a view moves by {moved:.2g} logits with what else is in the batch"
        self.unsteady = None if moved <= limit else what
        self.tolerance = max(TOLERANCE[self.precision], margin, 2 * tolerance)

    def _batch(self, views: Tensor) -> np.ndarray:
        with autocast(self.precision, self.fabric.device):  # Fabric's own module rounds otherwise in bf16
            answer: np.ndarray = self.function(views.to(self.fabric.device)).float().cpu().numpy()
        return answer

    def _logits(self, view: Tensor) -> np.ndarray:
        answer: np.ndarray = self._batch(view[None])[0]
        return answer

    @torch.inference_mode()
    def look(self, item: Item, record: Record) -> Looked:
        """Look at the image of a record."""
        found, where = Verification(""), place(item.index, item.name)
        if (item.name, item.label) != (record["name"], record["label"]):
            found.add(where, _other_name(item, record))
        mismatch = _mismatch(item, record)
        if mismatch is not None:
            found.add(where, mismatch)
        elif item.pixels is not None:
            image = item.pixels.float() / 255
            sighting = Sighting(record, self.experiment, image, self._logits, self.tolerance, self.function)
            self.compare(sighting)
            _tell(sighting, where, found)
        return Looked(found.findings, bool(found.undecided), self.unsteady)


class WorkingEyes(Eyes):
    """What a worker of a team holds: eyes, and the images as far as they are seen there."""

    def __init__(self, device: str, *, source: Source, sample: str, **eyes: Any) -> None:
        super().__init__(device=device, **eyes)
        self.seen = Seen(source, self.model.spec, sample)

    def facts(self) -> Facts:
        network = self.model.network
        return Facts.of(network, weights_sha256(network), self.model.spec.image_size, self.fabric)

    def __call__(self, task: tuple[Record, Block]) -> Looked | Unseen:
        items = self.seen.items(task[1])
        return Unseen(always=not self.seen.sees) if items is None else self.look(items[0], task[0])


def look_again(
    records: dict[int, Record],
    experiment: Experiment,
    compare: Compare,
    *,
    model: Given,
    source: Source,
    device: str,
    tolerance: float = 0.0,
    team: Team | None = None,
    found: Verification,
) -> None:
    """Look at the images of these records again, by their index in the source.

    ``tolerance``: how far logits of a probe were seen to move by rounding before it was certified, compiled
    or not. Other views may move twice as far, which leaves them undecided. ``team``: workers that look, each
    on a device of its own; None: this process.

    Raises CertiPatchError if the stated precision is none, or the model cannot be run.
    """
    eyes: dict[str, Any] = dict(experiment=experiment, compare=compare, model=model, tolerance=tolerance)
    if team is None:
        here, images = Eyes(device=device, **eyes), Images(source, model.spec)
        everything: Iterator[Looked] = (here.look(images[index], record) for index, record in records.items())
    else:
        everything = _by_workers(team, records, source, device, eyes)
    with progress_bar(len(records), "verify") as progress:
        for looked in everything:
            if looked.unsteady and looked.unsteady not in {one.what for one in found.findings}:
                found.add("model", looked.unsteady)
            found.recomputed += 1
            found.findings += looked.findings
            found.undecided += looked.undecided
            progress.advance(1, f"{len(found.findings)} findings")


def _by_workers(
    team: Team, records: dict[int, Record], source: Source, device: str, eyes: dict[str, Any]
) -> Iterator[Looked]:
    """What workers find, in the order of the records."""
    model, fabric = eyes["model"], make_fabric(device=device, precision=eyes["experiment"]["precision"])
    expected = Facts.of(model.network, model.weights_sha256, model.spec.image_size, fabric)
    model.network.cpu()  # it is sent to machines that have another device, or none
    make: Any = partial(WorkingEyes, source=source, sample=source.sample(), **eyes)
    team.lead(make, expected.why_refused)
    tasks = [(record, Block([index])) for index, record in records.items()]
    return team.map(tasks, send=lambda task: (task[0], packed(source, task[1])))


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
