"""What is found out about one image, as JSON: the same of ``predict``, of the service and of an exported
predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .claims import proof_of, statement


@dataclass(frozen=True)
class Said:
    """How verdicts of PatchCleanser on images are put into words.

    Attributes:
        classes: the name of each label; ``shown`` the same as people call it.
        threat: the shapes and the number of patches. ``way``: masks per axis, precision and inference.
        least: the least margin, in logits, of what counts as proven.
    """

    classes: Sequence[str]
    shown: Sequence[str]
    threat: Mapping[str, Any]
    way: Mapping[str, Any]
    least: float

    def plain(self, verdict: Any) -> dict[str, Any]:
        """The answer."""
        label, vanilla = verdict.defended_label, verdict.vanilla_label
        words = {} if self.shown[label] == self.classes[label] else {"class_in_words": self.shown[label]}
        return {
            **{"label": label, "class": self.classes[label], "case": verdict.case},
            **{"vanilla_label": vanilla, "vanilla_class": self.classes[vanilla]},
            "margin": verdict.margin,
            **self.threat,
            **self.way,
            **words,
        }

    def proven(self, verdict: Any, **by_place: Any) -> dict[str, Any]:
        """The answer and what is proven of it; ``by_place`` are further entries."""
        plain = self.plain(verdict)
        proof = proof_of(bool(verdict.unchangeable), verdict.margin, self.least)
        return {
            **plain,
            "unchangeable": proof == "unchangeable",
            "min_margin": self.least,
            "passes": verdict.passes,
            **by_place,
            "statement": statement(proof, plain["class"], self.threat),
        }

    def seen(self, verdict: Any, *, prove: bool) -> dict[str, Any]:
        """The answer, or its proof, with what a person wants to see of the views behind it."""
        found = self.proven(verdict) if prove else self.plain(verdict)
        views = {"passes": verdict.passes, "one_mask": list(verdict.one_mask)}
        failing = {"failing_pair": verdict.failing_pair, "failing_label": verdict.failing_label}
        return {**found, **views, **(failing if prove else {})}
