"""Robust masking, a rule on integers: of each class counts what is left under the mask that takes most away.

Source: PatchGuard (Xiang et al., USENIX Security 2021) at its threshold T = 0, which its main results have. A
*mask* hides a set of windows, and whatever a patch can reach lies in one of the masks. Evidence is never
negative. The score of a class is the smallest sum of its evidence that is left under any mask, and the answer
is the class of the largest score; ties: the smallest class.

The theorem. Let a patch reach the windows of a set l. For (x, y) and a class c other than y, let

    upper(l, c) = the smallest sum of e[w, c] left under any mask that contains l,
    lower(l)    = the smallest sum of e[w, y] over the windows outside l and outside a mask, over all masks.

If lower(l) - upper(l, c) - [c < y] is 0 or more for every l and c, no patch changes the answer y. For a mask
that contains l hides all that the attacker wrote, so the score of c is at most upper(l, c); and since no
evidence is negative, y keeps at least what it has with zeros in l. Zeros for y and large numbers for c reach
both bounds at once, so the rule is exact. PatchCURE's code answers the first of equal classes and certifies
the last of them; here both take the first.
"""

from __future__ import annotations

import numpy as np

from ...errors import SoundnessError
from .integers import Weakest, check_evidence, check_masks, covers, product

AT_ONCE = 32  # sets of windows that are looked at together, those first that may have least


def masked_label(evidence: np.ndarray, masks: np.ndarray) -> int:
    """The class of the largest score, of evidence (windows, classes) and masks (masks, windows) bool."""
    _check(evidence, None)
    return int(product(~masks, evidence.T).min(axis=0).argmax())


def masked_slack(
    evidence: np.ndarray,
    label: int,
    touch: np.ndarray,
    masks: np.ndarray,
    *,
    over: np.ndarray | None = None,
) -> Weakest:
    """What the label has to spare at the weakest place: certified if it is 0 or more.

    Args:
        evidence: (windows, classes) int64, nothing negative.
        label: the true class y.
        touch: (sets, windows) bool of :func:`certipatch.geometry.reach.touched`.
        masks: (masks, windows) bool, True = hidden; the rows of ``touch`` are the smallest choice.
        over: ``covers(touch, masks)``, where it is known from before.

    Raises SoundnessError if evidence is negative or no integers, or a set of windows lies in no mask.
    """
    _check(evidence, label)
    if over is None:
        check_masks(touch, masks)
        over = covers(touch, masks)
    shown = (~masks).astype(np.float64)
    left = product(shown, evidence.T)
    alone = (over.sum(axis=1) == 1).all()  # each set lies in one mask, as where they are the same
    upper = left[over.argmax(axis=1)] if alone else np.array([left[of_set].min(axis=0) for of_set in over])
    upper += np.arange(evidence.shape[1]) < label
    rivals = np.where(np.arange(evidence.shape[1]) == label, np.iinfo(np.int64).min, upper)
    rival, most = rivals.argmax(axis=1), rivals.max(axis=1)
    own = evidence[:, label]
    # What l and the best mask hold together is counted twice here, so that a set may have more than this.
    at_least = left[:, label].min() - product(touch, own[None])[:, 0] - most
    order, found = np.argsort(at_least, kind="stable"), np.full(len(touch), np.iinfo(np.int64).max)
    for some in np.array_split(order, -(-len(order) // AT_ONCE)):
        if at_least[some[0]] > found.min():
            break  # no set that is left can have less
        found[some] = product(~touch[some] * own, shown).min(axis=1) - most[some]
    place = int(found.argmin())
    return Weakest(int(found[place]), place, int(rival[place]))


def _check(evidence: np.ndarray, label: int | None) -> None:
    check_evidence(evidence, label)
    if evidence.min() < 0:
        raise SoundnessError(f"evidence: expected nothing negative, found {evidence.min()}; clip it at 0")
