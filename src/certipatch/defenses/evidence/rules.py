"""The rules on evidence as a defense holds them: each bound to what a patch can reach, answer and slack.

| rule | of | knows the patch size at inference |
|---|---|---|
| :class:`BoundedSum` | De-randomized Smoothing, Smoothed ViT, BagCert, Clipped BagNet | no |
| :class:`RobustMasking` | PatchGuard | yes: it hides what a patch of that size can reach |
| :class:`TwoMasks` | PatchCURE, where all of the network has limited sight | yes, likewise |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from ...geometry.reach import Reach
from .integers import Weakest, check_evidence, check_masks, covers, product
from .robust_masking import masked_label, masked_slack
from .sums import sum_label, sum_slack, sum_slack_published
from .two_masks import two_mask_table

Answer = Callable[[np.ndarray], int]  # the table of two-mask labels -> the label that PatchCleanser answers


class Rule(Protocol):
    """An answer from evidence (windows, classes), and what it has to spare; certified if that is 0 or more.

    Attributes:
        name: as it stands in a manifest.
        patch_size_known: whether the answer depends on the size of the patch that is reckoned with.
    """

    name: str
    patch_size_known: bool

    def label(self, evidence: np.ndarray) -> int:
        """The answer."""
        ...

    def slack(self, evidence: np.ndarray, label: int, touch: np.ndarray | None = None) -> Weakest:
        """What the label has to spare, where it has least: of all sets that a patch can reach, or of some of
        them, ``touch`` (sets, windows)."""
        ...

    def published(self, evidence: np.ndarray, label: int) -> int | None:
        """The same by the papers' own condition, where that is another."""
        ...

    def held_windows(self, evidence: np.ndarray, label: int, order: np.ndarray) -> int:
        """Of a certified label: how many windows, in this order, may say anything without its loss."""
        ...


@dataclass(frozen=True)
class BoundedSum:
    """Rule A, for evidence of this spread."""

    reach: Reach
    spread: int
    name = "bounded-sum"
    patch_size_known = False

    def label(self, evidence: np.ndarray) -> int:
        return sum_label(evidence)

    def slack(self, evidence: np.ndarray, label: int, touch: np.ndarray | None = None) -> Weakest:
        return sum_slack(evidence, label, self.reach.touch if touch is None else touch, self.spread)

    def published(self, evidence: np.ndarray, label: int) -> int | None:
        return sum_slack_published(evidence, label, self.reach.touch, self.spread)

    def held_windows(self, evidence: np.ndarray, label: int, order: np.ndarray) -> int:
        """Windows that may say anything are as if a patch at any place reached them too; found by bisection,
        for more of them only take away."""
        classes = _deciding(evidence, label)
        few, place = evidence[:, classes], int(np.searchsorted(classes, label))
        held, lost = 0, len(order)  # with all windows free nothing is certified
        while lost - held > 1:
            middle = (held + lost) // 2
            free = np.zeros(len(order), dtype=bool)
            free[order[:middle]] = True
            spare = sum_slack(few, place, self.reach.touch | free, self.spread).slack
            held, lost = (middle, lost) if spare >= 0 else (held, middle)
        return held


@dataclass(frozen=True)
class RobustMasking:
    """Rule B, with what a patch can reach as masks."""

    reach: Reach
    name = "robust-masking"
    patch_size_known = True

    def label(self, evidence: np.ndarray) -> int:
        return masked_label(evidence, self.reach.touch)

    def slack(self, evidence: np.ndarray, label: int, touch: np.ndarray | None = None) -> Weakest:
        masks = self.reach.touch
        if touch is None:
            return masked_slack(evidence, label, masks, masks, over=self._over)
        return masked_slack(evidence, label, touch, masks)

    @cached_property
    def _over(self) -> np.ndarray:
        """Which masks lie over which sets, found once for all images."""
        check_masks(self.reach.touch, self.reach.touch)
        return covers(self.reach.touch, self.reach.touch)

    def published(self, evidence: np.ndarray, label: int) -> int | None:
        return None

    def held_windows(self, evidence: np.ndarray, label: int, order: np.ndarray) -> int:
        return 0


@dataclass(frozen=True)
class TwoMasks:
    """Rule C, with what a patch can reach as masks and PatchCleanser's answer to a table of two-mask labels.

    The slack is the least of how far the label's sum leads another class's under two masks; ``place`` is the
    first of the two.
    """

    reach: Reach
    answer: Answer
    name = "two-masks"
    patch_size_known = True

    def label(self, evidence: np.ndarray) -> int:
        return self.answer(two_mask_table(evidence, self.reach.touch, self.reach.touch))

    def slack(self, evidence: np.ndarray, label: int, touch: np.ndarray | None = None) -> Weakest:
        check_evidence(evidence, label)
        masks, classes = self.reach.touch, np.arange(evidence.shape[1])
        found = []
        for place, mask in enumerate(masks if touch is None else touch):
            left = product(~masks, (evidence * ~mask[:, None]).T)
            lead = left[:, [label]] - left - (classes < label)
            lead[:, label] = np.iinfo(np.int64).max
            found.append(Weakest(int(lead.min()), place, int(lead.min(axis=0).argmin())))
        return min(found, key=lambda one: one.slack)

    def published(self, evidence: np.ndarray, label: int) -> int | None:
        return None

    def held_windows(self, evidence: np.ndarray, label: int, order: np.ndarray) -> int:
        return 0


def _deciding(evidence: np.ndarray, label: int) -> np.ndarray:
    """The label and the classes that decide, in order: of those without any evidence the smallest will do."""
    without = [c for c in np.flatnonzero((evidence == evidence.min()).all(axis=0)) if c != label]
    return np.setdiff1d(np.arange(evidence.shape[1]), without[1:])
