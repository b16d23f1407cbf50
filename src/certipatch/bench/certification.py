"""TODO."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.source import Source
from ..defenses.contract import Verdict
from ..errors import DataError, SoundnessError
from ..records.read import read_records
from .case import Case
from .published import published_answer, published_loop
from .rounds import _outcome, _quotients, _shown, interleaved, row

CHECKED, TIMED_PAIRS = (
    4,
    40,
)  # without ``full``: images compared over all pairs, and pairs that the loop is timed on


BLOCK = 16  # images, in the search for certified ones


def certification(case: Case) -> dict[str, Any]:
    """``certify`` against the published loop in float32, on images in memory. Equal answers first, then
    time."""
    (images, labels), names, k = case.data, case.source.names, len(case.masks)
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    # The published code normalises before it masks, and leaves the memory layout as torch has it.
    plain = copy.deepcopy(case.network[1:]).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    normalised = case.network[0](images).contiguous()
    keep = list(case.masks.keep[:, None, None].to(images.device))

    began = time.perf_counter()
    defense = case.defense()
    verdicts = defense.certify(images, labels)
    first = time.perf_counter() - began
    exact = (
        verdicts
        if case.settings.precision == "32-true"
        else case.defense(precision="32-true").certify(images, labels)
    )
    checked = len(images) if case.full else min(CHECKED, len(images))
    check_equal(names[:checked], exact[:checked], published_loop(plain, normalised[:checked], keep, pairs))
    differences = [
        {"image": name, "32-true": _outcome(one), case.settings.precision: _outcome(other)}
        for name, one, other in zip(names, exact, verdicts, strict=True)
        if _outcome(one)[:2] != _outcome(other)[:2]
    ]

    timed = pairs if case.full else pairs[:: math.ceil(len(pairs) / TIMED_PAIRS)]
    loop, ours = interleaved(
        case.repeats, lambda: published_loop(plain, normalised, keep, timed), lambda: defense.certify(images, labels)
    )  # fmt: skip
    loop = [seconds * len(pairs) / len(timed) for seconds in loop]
    passes = sum(verdict.passes for verdict in verdicts) / len(images)
    certified = sum(bool(verdict.certified) for verdict in verdicts)
    notes = [
        f"{checked} of {len(images)} images compared with the full loop: equal certificates and defended "
        "labels in float32"
    ]
    if not case.full:
        notes.append(
            f"the loop was timed on {len(timed)} of its {len(pairs)} pairs, its seconds are extrapolated "
            "from these"
        )
    notes += (
        [f"{len(differences)} images differ in {case.settings.precision}"] if exact is not verdicts else []
    )
    notes += [" ".join(f"{key} {value}" for key, value in found.items()) for found in differences]
    notes += [
        f"{certified} of {len(images)} images certified; {first:.0f} s to build the defense and use it for "
        "the first time"
    ]
    return {
        "rows": [
            row("published loop, float32", "s/image", [s / len(images) for s in loop], len(pairs)),
            row(f"certify, {_shown(defense)}", "s/image", [s / len(images) for s in ours], passes, _quotients(loop, ours)),
        ],
        "compared": checked, "certified": certified, "pairs": len(pairs), "pairs_timed": len(timed), "differences": differences, "network": defense.network.describe(),
        "notes": notes,
    }  # fmt: skip


def check_equal(names: Sequence[str], verdicts: Sequence[Verdict], tables: np.ndarray) -> None:
    """Raises SoundnessError for the first image whose verdict is not what the published loop's table says."""
    for name, verdict, table in zip(names, verdicts, tables, strict=True):
        expected, found = (
            published_answer(table, verdict.label or 0),
            (verdict.certified, verdict.defended_label),
        )
        if found != expected:
            raise SoundnessError(
                f"image {name}: expected (certified, defended label) {expected} as in the published loop, "
                f"found {found} with a smallest "
                f"margin of {verdict.margin:.2g}; nothing is timed. Unless the margin is a matter of "
                "rounding, report it"
            )


def only_certified(case: Case, limit: int) -> Source:
    """The first ``limit`` images, in a random order (seed 0), that are certified in float32: there no
    schedule can stop early.

    Raises DataError if there is none.
    """
    defense = case.defense(precision="32-true")
    order = torch.randperm(len(case.source), generator=torch.Generator().manual_seed(0)).tolist()
    found: list[int] = []
    for start in range(0, len(order), BLOCK):
        some = order[start : start + BLOCK]
        found += [
            index
            for index, verdict in zip(some, defense.certify(*case.load(some)), strict=True)
            if verdict.certified
        ]
        if len(found) >= limit:
            break
    if not found:
        raise DataError(
            f"only certified: expected a certified image among {len(case.source)}, found none; train the "
            "model on masked images"
        )
    return case.source.take(found[:limit])


def certified_in(folder: Path, source: Source) -> Source:
    """The images of the source that were certified in a folder that ``certify`` wrote. Raises DataError if
    there is none."""
    names = {record.name for record in read_records(folder) if record.certified}
    found = [index for index, name in enumerate(source.names) if name in names]
    if not found:
        raise DataError(
            f"certified {folder}: expected certified images of this data, found none among {len(names)}; "
            "give the same --data"
        )
    return source.take(found)
