"""TODO."""

from __future__ import annotations

import math
import re
from typing import Any

from .detection import check_record
from .findings import Verification

CASES = {"double-masking": ("agreed", "disagreer", "majority"), "challenger": ("agreed", "champion")}


def _check_record(
    index: int, record: dict[str, Any], experiment: dict[str, Any], found: Verification
) -> bool:
    """What follows from what within one record. True if all of it does."""
    before = len(found.findings)
    masks, classes = len(experiment["masks"]["windows"]), experiment["model"]["num_classes"]
    most = 1 + masks * (masks + 1) // 2
    challenged = "inference" in experiment
    where = f"image {index} ({record['name']!r})"[:120]
    label = record["label"]

    def is_class(value: Any) -> bool:
        return type(value) is int and 0 <= value < classes

    def expect(holds: bool, what: str) -> None:
        if not holds:
            found.add(where, what)

    expect(
        isinstance(record["name"], str) and is_class(label),
        f"expected a name and a label below {classes}, found {record['name']!r}, {label!r}"[:160],
    )
    certified = record.get("certified", False)  # of detection it follows from the threshold
    expect(type(certified) is bool, f"certified is {certified!r}")
    if record["error"] is not None:
        empty = all(
            value is None
            for key, value in record.items()
            if key not in ("index", "name", "label", "certified", "passes", "error")
        )
        no_passes = type(record["passes"]) is int and record["passes"] == 0
        expect(
            empty and certified is False and no_passes, "an unreadable image has no labels and no certificate"
        )
        expect(
            type(record["error"]) is str and record["error"] != "",
            f"error {record['error']!r} is no reason"[:160],
        )
        return len(found.findings) == before
    expect(
        isinstance(record["pixels"], str) and re.fullmatch("[0-9a-f]{64}", record["pixels"]) is not None,
        "pixels is not a sha256",
    )
    if found.kind == "detect":
        check_record(record, masks, is_class, expect)
        return len(found.findings) == before
    defended, pair, wrong, margin = (
        record[key] for key in ("defended_label", "failing_pair", "failing_label", "margin")
    )
    expect(
        is_class(record["vanilla_label"]) and is_class(defended),
        f"labels {record['vanilla_label']!r}, {defended!r} are not classes below {classes}",
    )
    expect(
        record["case"] in CASES["challenger" if challenged else "double-masking"],
        f"case is {record['case']!r}",
    )
    finite = type(margin) in (int, float) and math.isfinite(margin) and margin >= 0
    expect(finite, f"margin {margin!r} is not a finite number from 0 up")
    passes = record["passes"]
    whole = record["certified"] is True or experiment["exhaustive"] is True
    one_fails = isinstance(pair, list) and len(pair) == 2 and pair[0] == pair[1]
    limit = min(most, 2 * masks) if challenged and one_fails else most  # a mask is out after each game
    fits = type(passes) is int and (passes == most if whole else 1 + masks <= passes <= limit)
    expect(
        fits, f"passes {passes!r}: expected {most if whole else f'{1 + masks} to {limit}'} with {masks} masks"
    )
    if record["certified"] is True:
        right = defended == label and record["case"] == "agreed" and pair is None and wrong is None
        expect(right, "is certified, but its other fields say it is not")
        return len(found.findings) == before
    ordered = (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(i) is int for i in pair)
        and 0 <= pair[0] <= pair[1] < masks
    )
    expect(ordered, f"is not certified, but failing_pair {pair!r} is not a pair of the {masks} masks")
    expect(
        is_class(wrong) and wrong != label,
        f"is not certified, but failing_label {wrong!r} is not a wrong class",
    )
    if ordered and pair[0] < pair[1]:
        expect(
            defended == label and record["case"] == "agreed",
            "fails on two masks only, but one mask alone does not answer the label",
        )
    if ordered and pair[0] == pair[1]:
        expect(
            defended == wrong or record["case"] != "agreed",
            "fails on one mask, but all masks agree on another label",
        )
    return len(found.findings) == before


def _is_certified(record: dict[str, Any]) -> bool:
    agreement = record.get("agreement")
    return record.get("certified") is True or (type(agreement) is float and agreement > 0)
