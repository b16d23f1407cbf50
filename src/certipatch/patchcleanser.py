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


def missing_pairs(table: np.ndarray, label: int | None) -> np.ndarray:
    """The pairs (i <= j) that must still be known, as an (n, 2) array; empty when everything is decided.

    The table's diagonal is known. For the certificate (``label`` given) one wrong entry decides; for
    Algorithm 1 a row decides as soon as one entry disagrees. Rows are asked for one at a time, in the order in
    which Algorithm 1 looks at them.
    """
    first_round = table.diagonal()
    if label is not None and (first_round == label).all():
        # The defended label is settled (agreed); the certificate needs every pair, or one wrong one.
        if ((table != label) & (table != UNKNOWN)).any():
            return np.empty((0, 2), dtype=np.int64)
        return np.argwhere(np.triu(table == UNKNOWN))
    majority = majority_label(first_round)
    for i in np.flatnonzero(first_round != majority):
        known = table[i] != UNKNOWN
        if (table[i][known] != first_round[i]).any():
            continue  # this disagreer has been outvoted
        others = np.flatnonzero(~known)
        return np.sort(np.stack([np.full_like(others, i), others], axis=1), axis=1)
    return np.empty((0, 2), dtype=np.int64)
