"""What follows from what within one line of the records, whatever the defense."""

from __future__ import annotations

import re
import sys

from .findings import Record
from .restatement import Line, Restatement

LARGEST = sys.float_info.max  # a whole number in JSON may be larger

# The least margin, in logits, of a certificate that counts, by precision.
LEAST_MARGIN = {"32-true": 1e-3, "16-mixed": 2**-7, "bf16-mixed": 2**-4}

# What a line about an image that cannot be read says all the same.
OF_UNREADABLE = {"index", "name", "label", "certified", "passes", "error"}


def check_line(line: Line, restatement: Restatement) -> bool:
    """Check one line. True if nothing about it is wrong, so that its image can be looked at again."""
    before, record = len(line.found.findings), line.record
    name, label = record["name"], record["label"]
    line.expect(
        isinstance(name, str) and line.is_class(label),
        f"expected a name and a label below {line.classes}, found {name!r}, {label!r}",
    )
    certified = record.get("certified", False)  # lines of detection have no flag: a threshold decides
    line.expect(type(certified) is bool, f"certified is {certified!r}")
    if record["error"] is None:
        line.expect(is_sha256(record["pixels"]), "pixels is not a sha256")
        restatement.check_line(line)
    else:
        _check_unreadable(line, restatement.fields | restatement.optional_fields)
    return len(line.found.findings) == before


def _check_unreadable(line: Line, fields: frozenset[str]) -> None:
    """An image that cannot be read has a reason for it and nothing else."""
    record, error = line.record, line.record["error"]
    empty = all(record.get(field) is None for field in fields - OF_UNREADABLE)
    uncertified = record.get("certified", False) is False
    no_passes = type(record["passes"]) is int and record["passes"] == 0
    line.expect(empty and uncertified and no_passes, "an unreadable image has no labels and no certificate")
    line.expect(type(error) is str and error != "", f"error {error!r} is no reason")


def check_labels(line: Line, *labels: object) -> None:
    """Expect that all answers are classes of the model."""
    said = ", ".join(map(repr, labels))
    line.expect(all(map(line.is_class, labels)), f"labels {said} are not classes below {line.classes}")


def check_margin(line: Line) -> None:
    """Expect that the margin, the smallest between two logits, is a number that one can be."""
    margin = line.record["margin"]
    line.expect(is_margin(margin), f"margin {margin!r} is not a finite number from 0 up")


def is_margin(value: object) -> bool:
    """Whether a value can be the difference between two logits, the larger one first."""
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value <= LARGEST  # NaN is not


def check_answer(line: Line) -> None:
    """Expect what holds for every defense of ``certify``: a certified image is answered right, for one."""
    record = line.record
    defended, margin, passes = (record[field] for field in ("defended_label", "margin", "passes"))
    answers = [] if defended is None else [defended]  # none where the defense raised an alarm
    check_labels(line, record["vanilla_label"], *answers)
    if margin is not None:  # not every defense has one
        check_margin(line)
    line.expect(type(passes) is int and passes >= 0, f"passes {passes!r} is not a number from 0 up")
    line.expect(
        record["certified"] is not True or defended == record["label"],
        f"is certified, but defended_label {defended!r} is not the label {record['label']!r}",
    )


def is_below(record: Record, least: float) -> bool:
    """Whether a line has a margin smaller than this; not every defense has one."""
    margin = record.get("margin")
    return isinstance(margin, int | float) and margin < least


def is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
