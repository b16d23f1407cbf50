"""What ``verify`` knows of records of detection: what follows from what in a line, and what its image's views
say.

Like ``verify``, it restates what it checks: nothing here comes from ``minority_reports`` or ``detection``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

FIELDS = {"index", "name", "label", "pixels", "vanilla_label", "agreement", "dissent", "passes", "error"}


ROUNDING = 1e-15  # of a confidence near 1 in double precision


def check_record(
    record: dict[str, Any], masks: int, is_class: Callable[[Any], bool], expect: Callable[[bool, str], None]
) -> None:
    """What follows from what within one line of an image that could be read; ``expect`` notes what does not
    hold."""
    vanilla, agreement, dissent = (record[key] for key in ("vanilla_label", "agreement", "dissent"))
    expect(is_class(vanilla), f"vanilla_label {vanilla!r} is not a class")
    expect(
        type(record["passes"]) is int and record["passes"] == masks + 1,
        f"passes {record['passes']!r}: expected {masks + 1} with {masks} masks",
    )
    for name, value in (("agreement", agreement), ("dissent", dissent)):
        sound = value is None or (type(value) in (int, float) and 0 < value <= 1)  # NaN is not
        expect(sound, f"{name} {value!r} is not a confidence")
        if not sound:
            return
    right = vanilla == record["label"]
    if agreement is not None and right:
        expect(dissent is None, "all masks answer the label, and yet some dissent from it")
    if agreement is not None and not right:
        expect(
            dissent is not None and dissent >= agreement,
            "all masks answer another label than vanilla_label, and yet dissent less",
        )
    if agreement is None and right:
        expect(dissent is not None, "not all masks answer the label, and yet none dissents from it")


def compare(
    record: dict[str, Any],
    unmasked: np.ndarray,
    masked: list[np.ndarray],
    tolerance: float,
    differs: Callable[[str, bool], None],
) -> None:
    """Compare a record with the logits of the views of its image.

    Args:
        unmasked: (classes,) logits of the image; masked: those under each mask.
        differs: is told what differs, and whether by more than a ``tolerance`` of margins can do.
    """
    label, vanilla = record["label"], int(unmasked.argmax())
    answers = [int(logits.argmax()) for logits in masked]
    confidences = [_confidence(logits) for logits in masked]
    sure = all(np.diff(np.sort(logits)[-2:])[0] > tolerance for logits in (unmasked, *masked))
    if record["vanilla_label"] != vanilla:
        differs(f"vanilla_label {record['vanilla_label']!r}, found {vanilla}", sure)
        return
    agreement = min(confidences) if set(answers) == {label} else None
    against = [
        confidence for answer, confidence in zip(answers, confidences, strict=True) if answer != vanilla
    ]
    for name, found in (("agreement", agreement), ("dissent", max(against) if against else None)):
        stated = record[name]
        same = stated is found is None
        if stated is not None and found is not None:
            same = abs(stated - found) <= _moves(found, tolerance)
        if not same:
            differs(f"{name} {stated!r}, found {found!r}", sure)


def _confidence(logits: np.ndarray) -> float:
    """The softmax of the best."""
    return 1 / math.fsum(math.exp(float(logit) - float(logits.max())) for logit in logits)


def _moves(confidence: float, tolerance: float) -> float:
    """By how much a confidence p moves at most when each margin moves by the tolerance t: p (1-p) (e^t - 1),
    and by rounding."""
    return confidence * (1 - confidence) * math.expm1(tolerance) + ROUNDING
