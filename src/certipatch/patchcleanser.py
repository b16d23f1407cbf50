"""PatchCleanser's algorithms, on integers only: no network, no pixels.

Source: PatchCleanser (Xiang, Mahloujifar, Mittal; USENIX Security 2022). A *table* is the symmetric
(masks, masks) array of labels ``table[i, j] = F(x.m_i.m_j)``; its diagonal holds the one-mask labels.
An entry not computed yet is ``UNKNOWN``, which equals no label: what is not known never certifies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

UNKNOWN = -1

Case = Literal["agreed", "disagreer", "majority"]


def majority_label(first_round: Sequence[int] | np.ndarray) -> int:
    """The most frequent one-mask label; ties: the smallest."""
    labels, counts = np.unique(np.asarray(first_round), return_counts=True)
    return int(labels[counts.argmax()])


def double_masking(first_round: Sequence[int], second_round: Callable[[int], Iterable[int]]) -> tuple[int, Case]:
    """Algorithm 1: the defended label, and which of its three cases decided.

    Args:
        first_round: the label under each single mask.
        second_round: for a mask i, the labels under masks i and j for every j. It is called for disagreeing
            masks only, and may be a row of a stored table or a live model.
    """
    majority = majority_label(first_round)
    if all(label == majority for label in first_round):
        return majority, "agreed"
    for i, label in enumerate(first_round):
        if label != majority and all(second == label for second in second_round(i)):
            return int(label), "disagreer"
    return majority, "majority"


def two_mask_correct(table: np.ndarray, label: int) -> bool:
    """Algorithm 2: is (x, label) certified? Every one- and two-mask prediction must be ``label``.

    Theorem 1: if so, and the mask set covers the patch, :func:`double_masking` answers ``label`` on x under
    every content of the patch at every position.
    """
    return bool((table == label).all())
