"""Two masks on evidence, a rule on integers: PatchCleanser's table without its forward passes.

Source: PatchCURE (Xiang et al., USENIX Security 2024), where the whole network has limited sight. The label
under two masks is the class of the largest sum of evidence that they leave; ties: the smallest class. A mask
that contains whatever a patch reaches leaves clean evidence alone, under every second mask. That is all that
Theorem 1 of PatchCleanser needs of a table, so its algorithms answer and certify on this one as they are.
Evidence may be negative.
"""

from __future__ import annotations

import numpy as np

from .integers import check_evidence, check_masks, product


def two_mask_table(evidence: np.ndarray, touch: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """(masks, masks) int64: the label under masks i and j; the diagonal has the one-mask labels.

    Args:
        evidence: (windows, classes) int64.
        touch: (sets, windows) bool of :func:`certipatch.geometry.reach.touched`.
        masks: (masks, windows) bool, True = hidden.

    Raises SoundnessError if evidence is no integers, or a set of windows lies in no mask.
    """
    check_evidence(evidence)
    check_masks(touch, masks)
    return np.array([product(~masks, (evidence * ~mask[:, None]).T).argmax(axis=1) for mask in masks])
