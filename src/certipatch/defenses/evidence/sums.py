"""The bounded sum, a rule on integers: evidence of all windows is added, and no window counts for much.

Sources: De-randomized Smoothing (Levine and Feizi, NeurIPS 2020), Clipped BagNet (Zhang et al., 2020),
BagCert (Metzen and Yatsura, ICLR 2021), Smoothed ViT (Salman et al., CVPR 2022). Each adds evidence that lies
in an interval of length R (the *spread*: 1 for votes) whatever a window shows, and answers the class of the
largest sum; ties: the smallest class.

The theorem. Let a patch reach the windows of a set l. For (x, y) and a class c other than y, let

    slack(l, c) = sum of (e[w, y] - e[w, c]) over the windows w outside l  -  R |l|  -  [c < y].

If it is 0 or more for every l and c, no patch changes the answer y. For outside l the patch changes nothing,
and inside it moves each e[w, y] - e[w, c] to -R at worst: what is left is the smallest difference of the two
sums that he can reach, and against a smaller class, which wins ties, it must be at least 1. The rule is
exact: if it fails, evidence that turns the answer exists within l. Clipped BagNet's code looks only at the
class that is second on the clean image; a third one may win elsewhere, so every class is looked at here.
"""

from __future__ import annotations

import numpy as np

from ...errors import SoundnessError
from .integers import Weakest, check_evidence, product, weakest


def sum_label(evidence: np.ndarray) -> int:
    """The class of the largest sum of the evidence (windows, classes); ties: the smallest."""
    check_evidence(evidence)
    return int(evidence.sum(axis=0).argmax())


def sum_slack(evidence: np.ndarray, label: int, touch: np.ndarray, spread: int) -> Weakest:
    """What the label has to spare at the weakest place: certified if it is 0 or more.

    Args:
        evidence: (windows, classes) int64.
        label: the true class y.
        touch: (sets, windows) bool of :func:`certipatch.geometry.reach.touched`.
        spread: R, the largest evidence that a window can have for a class minus the smallest.

    Raises SoundnessError if the evidence is no integers, or wider spread than stated.
    """
    _check(evidence, label, spread)
    outside = product(~touch, evidence.T)
    slack = outside[:, [label]] - outside - spread * touch.sum(axis=1)[:, None]
    return weakest(slack - (np.arange(evidence.shape[1]) < label), label)


def sum_slack_published(evidence: np.ndarray, label: int, touch: np.ndarray, spread: int) -> int:
    """The slack of the papers, which does not know the place: twice the spread for as many windows as a patch
    can reach anywhere. It is never above that of :func:`sum_slack`."""
    _check(evidence, label, spread)
    total, most = evidence.sum(axis=0), int(touch.sum(axis=1).max())
    slack = total[label] - total - 2 * spread * most - (np.arange(len(total)) < label)
    return weakest(slack[None], label).slack


def _check(evidence: np.ndarray, label: int, spread: int) -> None:
    check_evidence(evidence, label)
    found = int(evidence.max()) - int(evidence.min())
    if found > spread:
        raise SoundnessError(f"evidence: expected a spread of at most {spread}, found {found}; clip it")
