"""``report --require 'certified>=0.6'``: a condition on the shares of folders of records, for scripts."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..errors import ConfigError
from .compared import AttackSummary, Compared
from .detection import DetectionSummary
from .shares import Share

NAMES = {
    "certified": "certified_robust_accuracy",
    "clean": "clean_accuracy",
    "vanilla": "vanilla_accuracy",
    "attacked": "attacked_accuracy",
    "detected": "certified_detection_accuracy",
}
COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
FORM = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\d+(?:\.\d+)?)\s*(%?)\s*")


@dataclass(frozen=True)
class Requirement:
    """A share by its name, and what it is compared with, from 0 to 1."""

    text: str
    measure: str
    comparison: str
    least: Fraction

    def broken_by(self, compared: Compared) -> list[str]:
        """A line for each folder that does not fulfil it: it is not complete, or its share is otherwise.

        The share is compared as a fraction of whole numbers, without rounding. Raises ConfigError if no
        folder has such a share.
        """
        found = [(one, where, share) for one in compared.every for where, share in _shares(one, self.measure)]
        if not found:
            raise ConfigError(f"require {self.text!r}: expected a folder with {self.measure}, found none")
        lines = []
        for one, where, share in found:
            complete = one.summary["complete"] if isinstance(one, AttackSummary) else one.complete
            if not complete:
                lines.append(f"not met: {self.text}: {where} is not complete")
            elif not COMPARISONS[self.comparison](Fraction(share.count, share.images), self.least):
                lines.append(f"not met: {self.text}: {where} has {self.measure} {share}")
        return lines


def parse_requirements(texts: Sequence[str]) -> list[Requirement]:
    """``["certified>=0.6"]``, or 60%, as conditions. Raises ConfigError."""
    return [_parsed(text) for text in texts]


def _parsed(text: str) -> Requirement:
    found = FORM.fullmatch(text)
    name = found and {**NAMES, **{long: long for long in NAMES.values()}}.get(found[1])
    if not (found and name):
        raise ConfigError(f"require {text!r}: expected one of {', '.join(NAMES)}, >= or <=, and 0.6 or 60%")
    least = Fraction(found[3]) / (100 if found[4] else 1)
    if least > 1:
        raise ConfigError(f"require {text!r}: expected a share from 0 to 1, found {found[3]}; 60% is 0.6")
    return Requirement(text, name, found[2], least)


def _shares(one: object, measure: str) -> list[tuple[str, Share]]:
    """The shares of this name in a folder: one, or one for each threshold of detection."""
    if isinstance(one, AttackSummary):
        found = one.summary.get(measure)
        return [(str(one.folder.path), Share(found["count"], found["images"]))] if found else []
    if isinstance(one, DetectionSummary):
        if measure == "vanilla_accuracy":
            return [(one.name, one.vanilla_accuracy)]
        return [
            (f"{one.name} at threshold {each.threshold:g}", each.shares[measure])
            for each in one.sweep
            if measure in each.shares
        ]
    share = getattr(one, measure, None)
    return [(str(getattr(one, "name", "")), share)] if isinstance(share, Share) else []
