"""What the script of the page can step through: one block of JSON for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from ...defenses.patchcleanser.algorithms import Case
from ...records.schema import PatchCleanserRecord, Record
from ..findings import (
    OfClass,
    Outcome,
    failing_label,
    failing_pair,
    failing_pairs,
    heat,
    of_classes,
    outcome,
)
from .shown import PAIRS, Shown

CLASSES = 12  # of the hardest ones
CASES: tuple[Case, ...] = get_args(Case)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


def block_of(run: Shown, pictures: Mapping[str, str], shown: Sequence[Record]) -> dict[str, Any]:
    """One run for the script.

    Args:
        pictures: addresses by the hash of the pixels. shown: the records of the gallery.
    """
    return {
        "name": run.name,
        "size": run.experiment.against.image_size,
        "fill": _colour(run.experiment.fill),
        "masks": run.windows,
        "classes": run.class_names,
        "images": _columns(run.records, run.summary.min_margin),
        "picture": {n: record.pixels for n, record in enumerate(run.records) if record.pixels in pictures},
        "gallery": _gallery(run, shown),
        "places": _places(run),
        **_failures(run),
        **_hardest(run),
    }


def _places(run: Shown) -> dict[str, Any] | None:
    """The map of proven places, of a patch of the first shape, measured at the centre of the patch.

    None unless it was certified by place, and for two patches, of whose pairs of places there is no picture.
    """
    if run.by_place is None or run.by_place.places.patches != 1:
        return None
    kind, (height, width) = run.by_place.places.kinds[0], run.summary.threat.patch_sizes[0]
    rows, columns = (_stretches(kind, axis) for axis in (0, 1))
    return {
        "cells": [
            [top + (height - 1) / 2, left + (width - 1) / 2, h, w, int(kind[top, left])]
            for top, h in rows
            for left, w in columns
        ],
        "hidden": [np.flatnonzero(hidden).tolist() for hidden in run.by_place.places.hidden],
        "mean": [float(f"{share:.4g}") for share in run.by_place.mean()],
        "proven": ["".join("01"[bit] for bit in row) for row in run.by_place.rows.astype(int).tolist()],
        "share": [float(f"{share:.4g}") for share in run.by_place.shares()],
    }


def _stretches(kind: np.ndarray, axis: int) -> list[tuple[int, int]]:
    """(start, length) of the longest runs of equal lines along an axis."""
    lines = kind if axis == 0 else kind.T
    starts = [0, *(np.flatnonzero((lines[1:] != lines[:-1]).any(axis=1)) + 1).tolist()]
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


def _colour(fill: Any) -> str:
    """The fill of masked pixels in hexadecimal digits; grey if the manifest is damaged here."""
    if not isinstance(fill, list) or len(fill) != 3:
        return "#808080"
    if not all(isinstance(part, int | float) and 0 <= part <= 1 for part in fill):
        return "#808080"
    return "#" + "".join(f"{round(255 * part):02x}" for part in fill)


def _columns(records: Sequence[Record], min_margin: float) -> dict[str, Any]:
    """Columns of values, an entry an image."""
    return {
        "index": [record.index for record in records],
        "name": [record.name for record in records],
        "label": [record.label for record in records],
        "vanilla": [record.vanilla_label for record in records],
        "defended": [record.defended_label for record in records],
        "case": list(map(_case, records)),
        "outcome": [OUTCOMES.index(outcome(record, min_margin)) for record in records],
        "pair": list(map(failing_pair, records)),
        "fails": list(map(failing_label, records)),
        "margin": list(map(_margin, records)),
        "passes": [record.passes for record in records],
        "error": {n: record.error for n, record in enumerate(records) if record.error is not None},
    }


def _case(record: Record) -> int | None:
    case = record.case if isinstance(record, PatchCleanserRecord) else None
    return None if case is None else CASES.index(case)


def _margin(record: Record) -> float | None:
    """The margin of a certificate; between wrong answers a margin says nothing."""
    if not record.certified or record.margin is None:
        return None
    return float(f"{record.margin:.4g}")


def _gallery(run: Shown, shown: Sequence[Record]) -> dict[str, list[int]]:
    """The places of the images to show, by their outcome."""
    place = {record.index: number for number, record in enumerate(run.records)}
    groups: dict[str, list[int]] = {"certified": [], "just missed": [], "hopeless": []}
    for record in shown:
        groups[outcome(record, run.summary.min_margin)].append(place[record.index])
    return groups


def _failures(run: Shown) -> dict[str, Any]:
    """Which pairs of masks fail most often, and which parts of the image they hide."""
    pairs = failing_pairs(run.records)
    plane = heat(pairs, run.windows, run.experiment.against.image_size)
    return {
        "pairs": [[*pair, n] for pair, n in pairs[:PAIRS]],
        "failing": sum(n for _, n in pairs),
        "allPairs": len(pairs),
        "once": sum(n == 1 for _, n in pairs),
        "heat": {"rows": plane.rows, "columns": plane.columns, "counts": plane.counts.tolist()},
    }


def _hardest(run: Shown) -> dict[str, Any]:
    classes = of_classes(run.records, run.summary.min_margin)
    return {"hardest": list(map(_of_class, classes[:CLASSES])), "allClasses": len(classes)}


def _of_class(one: OfClass) -> dict[str, Any]:
    return {
        "label": one.label,
        "images": one.vanilla_accuracy.images,
        "vanilla": one.vanilla_accuracy.count,
        "clean": one.clean_accuracy.count,
        "certified": one.certified_robust_accuracy.count,
        "interval": one.certified_robust_accuracy.interval,
        "wrong": one.wrong,
        "others": one.others,
    }
