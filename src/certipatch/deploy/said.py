"""What is found out about one image, as JSON: the same of ``predict``, of the service and of an exported
predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..geometry.patch import Threat, Window
from ..geometry.places import Places
from .claims import proof_of, statement


@dataclass(frozen=True)
class Said:
    """How verdicts of PatchCleanser on images are put into words.

    Attributes:
        classes: the name of each label; ``shown`` the same as people call it.
        threat: the shapes and the number of patches. ``way``: masks per axis, precision and inference.
        least: the least margin, in logits, of what counts as proven.
        windows: of each mask its windows as [top, left, height, width]; ``image_size`` is (height, width).
    """

    classes: Sequence[str]
    shown: Sequence[str]
    threat: Mapping[str, Any]
    way: Mapping[str, Any]
    least: float
    windows: Sequence[Sequence[Sequence[int]]]
    image_size: Sequence[int]

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

    def proven(self, verdict: Any) -> dict[str, Any]:
        """The answer and what is proven of it, by place too if that was looked at."""
        plain = self.plain(verdict)
        proof = proof_of(bool(verdict.unchangeable), verdict.margin, self.least)
        return {
            **plain,
            "unchangeable": proof == "unchangeable",
            "min_margin": self.least,
            "passes": verdict.passes,
            **self._by_place(verdict),
            "statement": statement(proof, self.shown[verdict.defended_label], self.threat),
        }

    def _by_place(self, verdict: Any) -> dict[str, Any]:
        """The masks whose rows are proven beyond rounding, and the share of places that they hide."""
        if verdict.proven is None:
            return {}
        rows = np.array([bit == "1" for bit in verdict.proven])
        rows[rows] = np.array(verdict.proven_margins) >= self.least
        share = self._places.share(rows)
        return {"proven_share_of_places": share, "proven_masks": np.flatnonzero(rows).tolist()}

    @cached_property
    def _places(self) -> Places:
        masks = [tuple(Window(*window) for window in mask) for mask in self.windows]
        return Places.of(masks, (self.image_size[0], self.image_size[1]), Threat.of(self.threat))

    def seen(self, verdict: Any, *, prove: bool) -> dict[str, Any]:
        """The answer, or its proof, with what a person wants to see of the views behind it."""
        found = self.proven(verdict) if prove else self.plain(verdict)
        views = {"passes": verdict.passes, "one_mask": list(verdict.one_mask)}
        failing = {"failing_pair": verdict.failing_pair, "failing_label": verdict.failing_label}
        return {**found, **views, **(failing if prove else {})}
