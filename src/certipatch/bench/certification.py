"""The theme ``certify``: certification against the published loop, with equal answers before any time.

Here are also the images of a benchmark that leaves no way to stop early: those that are certified.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.source import Source
from ..defenses.patchcleanser.examination import PatchCleanserVerdict
from ..errors import DataError, SoundnessError
from ..records.read import read_records
from .case import Case, settings_in_effect
from .published import published_answer, published_loop
from .rounds import interleaved, quotients, row

# Where not all is asked for (``Case.full``): how many images are compared over all pairs of masks, and on how
# many pairs the published loop is timed.
CHECKED, TIMED_PAIRS = 4, 40

SEARCHED_AT_ONCE = 16  # images, in the search for certified ones


def certification(case: Case) -> dict[str, Any]:
    """``certify`` against the published loop in float32, on images in memory.

    Raises SoundnessError if their answers are not equal; nothing is timed then.
    """
    (images, labels), loop = case.data, _PublishedLoop.of(case)
    n, began = len(images), time.perf_counter()
    defense = case.defense()
    verdicts = defense.certify(images, labels)
    first_seconds = time.perf_counter() - began
    exact = verdicts if case.exact else case.defense(precision="32-true").certify(images, labels)
    checked, timed = (n, loop.pairs) if case.full else (min(CHECKED, n), loop.some_pairs)
    check_equal(case.source.names[:checked], exact[:checked], loop.table(checked))

    published, ours = interleaved(
        case.repeats, lambda: loop.table(n, timed), lambda: defense.certify(images, labels)
    )
    published = [seconds * len(loop.pairs) / len(timed) for seconds in published]
    passes = sum(verdict.passes for verdict in verdicts) / n
    name = f"certify, {settings_in_effect(defense)}"
    found = {
        "compared": checked,
        "certified": sum(bool(verdict.certified) for verdict in verdicts),
        "pairs": len(loop.pairs),
        "pairs_timed": len(timed),
        "differences": _differences(case, exact, verdicts),
        "network": defense.network.describe(),
    }
    return {
        "rows": [
            row("published loop, float32", "s/image", [s / n for s in published], len(loop.pairs)),
            row(name, "s/image", [s / n for s in ours], passes, quotients(published, ours)),
        ],
        **found,
        "notes": _notes(case, found, first_seconds),
    }


@dataclass(frozen=True)
class _PublishedLoop:
    """:func:`published_loop` with its arguments for the images of a case."""

    network: nn.Module
    images: Tensor
    masks: list[Tensor]
    pairs: list[tuple[int, int]]

    @classmethod
    def of(cls, case: Case) -> _PublishedLoop:
        """The published code normalises before it masks, and leaves the memory layout as torch has it."""
        images, k = case.data[0], len(case.masks)
        layout: Any = {"memory_format": torch.contiguous_format}
        network = copy.deepcopy(case.network[1:]).to(**layout)
        masks = list(case.masks.keep[:, None, None].to(images.device))
        pairs = [(i, j) for i in range(k) for j in range(i, k)]
        return cls(network, case.network[0](images).contiguous(), masks, pairs)

    @property
    def some_pairs(self) -> list[tuple[int, int]]:
        """At most :data:`TIMED_PAIRS` of the pairs, spread over all."""
        return self.pairs[:: math.ceil(len(self.pairs) / TIMED_PAIRS)]

    def table(self, images: int, pairs: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
        """The labels of the first ``images`` images under pairs of masks, all pairs if none are named."""
        return published_loop(self.network, self.images[:images], self.masks, pairs or self.pairs)


def check_equal(names: Sequence[str], verdicts: Sequence[PatchCleanserVerdict], tables: np.ndarray) -> None:
    """Raises SoundnessError for the first image whose verdict is not what the published loop's table says."""
    for name, verdict, table in zip(names, verdicts, tables, strict=True):
        expected = published_answer(table, verdict.label or 0)
        found = (verdict.certified, verdict.defended_label)
        if found != expected:
            raise SoundnessError(
                f"image {name}: expected (certified, defended label) {expected} as in the published loop, "
                f"found {found} with a smallest margin of {verdict.margin:.2g}; nothing is timed. Unless the "
                "margin is a matter of rounding, report it"
            )


def _differences(
    case: Case, exact: Sequence[PatchCleanserVerdict], verdicts: Sequence[PatchCleanserVerdict]
) -> list[dict[str, Any]]:
    """The images that are answered otherwise in the case's precision than in float32, with both answers."""
    return [
        {"image": name, "32-true": _outcome(one), case.settings.precision: _outcome(other)}
        for name, one, other in zip(case.source.names, exact, verdicts, strict=True)
        if _outcome(one)[:2] != _outcome(other)[:2]
    ]


def _outcome(verdict: PatchCleanserVerdict) -> tuple[bool | None, int, float]:
    return verdict.certified, verdict.defended_label, verdict.margin


def _notes(case: Case, found: dict[str, Any], first_seconds: float) -> list[str]:
    images, precision = len(case.source), case.settings.precision
    notes = [
        f"{found['compared']} of {images} images compared with the full loop: equal certificates and "
        "defended labels in float32"
    ]
    if not case.full:
        notes.append(
            f"the loop was timed on {found['pairs_timed']} of its {found['pairs']} pairs, its seconds are "
            "extrapolated from these"
        )
    if not case.exact:
        notes.append(f"{len(found['differences'])} images differ in {precision}")
    for difference in found["differences"]:
        notes.append(" ".join(f"{key} {value}" for key, value in difference.items()))
    notes.append(
        f"{found['certified']} of {images} images certified; {first_seconds:.0f} s to build the defense and "
        "use it for the first time"
    )
    return notes


def only_certified(case: Case, limit: int) -> Source:
    """The first ``limit`` images, in a random order (seed 0), that are certified in float32.

    No schedule can stop early on them. Raises DataError if there is none.
    """
    defense = case.defense(precision="32-true")
    order = torch.randperm(len(case.source), generator=torch.Generator().manual_seed(0)).tolist()
    found: list[int] = []
    for start in range(0, len(order), SEARCHED_AT_ONCE):
        some = order[start : start + SEARCHED_AT_ONCE]
        verdicts = defense.certify(*case.load(some))
        found += [index for index, verdict in zip(some, verdicts, strict=True) if verdict.certified]
        if len(found) >= limit:
            break
    if not found:
        raise DataError(
            f"only certified: expected a certified image among {len(case.source)}, found none; train the "
            "model on masked images"
        )
    return case.source.take(found[:limit])


def certified_in(folder: Path, source: Source) -> Source:
    """The images of the source that were certified in a folder that ``certify`` wrote.

    Raises DataError if there is none.
    """
    names = {record.name for record in read_records(folder) if record.certified}
    found = [index for index, name in enumerate(source.names) if name in names]
    if not found:
        raise DataError(
            f"certified {folder}: expected certified images of this data, found none among {len(names)}; "
            "give the same --data"
        )
    return source.take(found)
