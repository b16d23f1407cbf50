"""Minority Reports, as ``verify`` knows it: what follows from what in a line, and what its image's views say.

Nothing here comes from ``defenses.minority_reports``, whose records are checked by it.
"""

from __future__ import annotations

import math

import numpy as np

from .findings import Record
from .restatement import ENTRIES, FIELDS, Line, Restatement, Sighting

ROUNDING = 1e-15  # of a confidence near 1 in double precision


def _check_line(line: Line) -> None:
    """What follows from what within one line."""
    vanilla, passes = line.record["vanilla_label"], line.record["passes"]
    line.expect(line.is_class(vanilla), f"vanilla_label {vanilla!r} is not a class")
    line.expect(
        type(passes) is int and passes == line.masks + 1,
        f"passes {passes!r}: expected {line.masks + 1} with {line.masks} masks",
    )
    for name in ("agreement", "dissent"):
        value = line.record[name]
        if not _is_confidence(value):
            line.expect(False, f"{name} {value!r} is not a confidence")
            return
    _check_confidences(line)


def _is_confidence(value: object) -> bool:
    """Whether this is a share of 1, or none."""
    return value is None or (type(value) in (int, float) and 0 < value <= 1)  # type: ignore[operator]


def _check_confidences(line: Line) -> None:
    """What the two confidences say of each other, by whether the undefended answer is right."""
    record = line.record
    agreement, dissent = record["agreement"], record["dissent"]
    right = record["vanilla_label"] == record["label"]
    if agreement is None:
        line.expect(
            dissent is not None or not right, "not all masks answer the label, and yet none dissents from it"
        )
    elif right:
        line.expect(dissent is None, "all masks answer the label, and yet some dissent from it")
    else:
        line.expect(
            dissent is not None and dissent >= agreement,
            "all masks answer another label than vanilla_label, and yet dissent less",
        )


def _compare(sighting: Sighting) -> None:
    """Compare a record with the view of its image under no mask and those under each mask."""
    unmasked, stated = sighting.under(), sighting.record["vanilla_label"]
    masked = [sighting.under(i) for i in range(sighting.masks)]
    vanilla = int(unmasked.argmax())
    sure = all(np.diff(np.sort(logits)[-2:])[0] > sighting.tolerance for logits in (unmasked, *masked))
    if stated != vanilla:
        sighting.differs(f"vanilla_label {stated!r}, found {vanilla}", surely=sure)
        return
    agreement, dissent = _agreement_and_dissent(masked, sighting.record["label"], vanilla)
    for name, found in (("agreement", agreement), ("dissent", dissent)):
        if not _same(sighting.record[name], found, sighting.tolerance):
            sighting.differs(f"{name} {sighting.record[name]!r}, found {found!r}", surely=sure)


def _agreement_and_dissent(
    masked: list[np.ndarray], label: int, vanilla: int
) -> tuple[float | None, float | None]:
    """The least confidence where all masks answer the label, and the greatest where one does not answer as
    the undefended model does."""
    confidences = [(int(logits.argmax()), _confidence(logits)) for logits in masked]
    agreed = all(answer == label for answer, _ in confidences)
    agreement = min(confidence for _, confidence in confidences) if agreed else None
    against = [confidence for answer, confidence in confidences if answer != vanilla]
    return agreement, max(against, default=None)


def _confidence(logits: np.ndarray) -> float:
    """The softmax of the best label."""
    return 1 / math.fsum(math.exp(float(logit) - float(logits.max())) for logit in logits)


def _same(stated: float | None, found: float | None, tolerance: float) -> bool:
    """Whether both are none, or differ by no more than margins that move by the tolerance can make them.

    A confidence p then moves by at most p (1-p) (e^t - 1), where t is the tolerance, and by rounding.
    """
    if stated is None or found is None:
        return stated is found
    return abs(stated - found) <= found * (1 - found) * math.expm1(tolerance) + ROUNDING


def _is_certified(record: Record) -> bool:
    agreement = record["agreement"]
    return type(agreement) in (int, float) and agreement > 0


MINORITY_REPORTS = Restatement(
    defense="minority-reports",
    entries=ENTRIES | {"masks", "fill"},
    fields=FIELDS - {"defended_label", "certified", "margin"} | {"agreement", "dissent"},
    is_certified=_is_certified,
    counted="certified for detection at threshold 0",
    check_line=_check_line,
    compare=_compare,
)
