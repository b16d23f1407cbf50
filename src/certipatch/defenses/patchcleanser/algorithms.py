"""PatchCleanser's algorithms, on integers only: no network, no pixels.

Source: PatchCleanser (Xiang, Mahloujifar, Mittal; USENIX Security 2022). A *table* is the symmetric (masks,
masks) array of labels ``table[i, j] = F(x.m_i.m_j)``; its diagonal holds the one-mask labels. An entry not
computed yet is ``UNKNOWN``, which equals no label: what is not known never certifies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import numpy as np

UNKNOWN = -1

Inference = Literal["double-masking", "challenger"]
INFERENCES: tuple[Inference, ...] = get_args(Inference)
Case = Literal["agreed", "disagreer", "majority", "champion"]


def majority_label(first_round: Sequence[int] | np.ndarray) -> int:
    """The most frequent one-mask label; ties: the smallest."""
    labels, counts = np.unique(np.asarray(first_round), return_counts=True)
    return int(labels[counts.argmax()])


def double_masking(
    first_round: Sequence[int], second_round: Callable[[int], Iterable[int]]
) -> tuple[int, Case]:
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


def challenger_masking(first_round: Sequence[int], pair: Callable[[int, int], int]) -> tuple[int, Case]:
    """Challenger masking: the same certificate as :func:`double_masking`, with a second round of at most n-1
    passes for n masks.

    Source: PatchCleanser's own code (``challenger_masking``). If all one-mask labels agree, that label is the
    answer. Otherwise mask 0 is champion, and the first mask left of another label challenges it. If the
    two-mask label is the challenger's, the champion is out and the challenger takes its place; if it is the
    champion's or neither's, the challenger is out. When all masks left have one label, that is the answer.
    One mask is out after each game, and the champion is always left.

    Why a certified image is answered right, whatever the patch: a mask c that covers it shows the clean image
    alone, so c has the true label y, and so have all its pairs. Played against a mask of another label, c as
    challenger wins and as champion stays: c is never out, and the label that all masks left share is c's.

    Args:
        first_round: the label under each single mask.
        pair: for a champion i and a challenger j, the label under both. No pair is asked for twice.
    """
    champion, left = 0, list(range(len(first_round)))
    while challengers := [j for j in left if first_round[j] != first_round[champion]]:
        challenger = challengers[0]
        if pair(champion, challenger) == first_round[challenger]:
            champion, challenger = challenger, champion
        left.remove(challenger)  # who lost
    return int(first_round[champion]), "agreed" if len(set(first_round)) == 1 else "champion"


def answer(table: np.ndarray, inference: Inference) -> tuple[int, Case]:
    """The defended label and its case from what is known of a table; ``schedule.py`` sees to it that this is
    enough."""
    first_round = table.diagonal().tolist()
    if inference == "challenger":
        return challenger_masking(first_round, lambda i, j: int(table[i, j]))
    return double_masking(first_round, lambda i: table[i].tolist())


def two_mask_correct(table: np.ndarray, label: int) -> bool:
    """Algorithm 2: is (x, label) certified? Every one- and two-mask prediction must be ``label``.

    Theorem 1: if so, and the mask set covers the patch, :func:`double_masking` answers ``label`` on x under
    every content of the patch at every position; and so does :func:`challenger_masking`.
    """
    return bool((table == label).all())


def proven_rows(table: np.ndarray, label: int) -> np.ndarray:
    """(masks,) bool: under which masks, alone and with any second one, every label is ``label``.

    Theorem (by place): if a mask m of such a *row* hides all of a patch, then both inferences answer
    ``label`` under every content of that patch at that place, on images that are not certified too.

    Proof. Under m the attacked image is the clean one, so row m of its table is what it was: all ``label``.
    In :func:`double_masking`, a mask that disagrees with the majority answers only if its pair with m says
    the same as it does, and that pair says ``label``. So if the majority is not ``label``, m itself disagrees
    and answers, unless another mask answers ``label`` before it; and if it is, no mask that says otherwise
    answers. In :func:`challenger_masking`, m wins each game against a mask of another label, as above, and is
    never out. Nothing else about the table was used, nor how ties are broken, nor that ``label`` is the true
    one. Algorithm 2 is the case that all rows are such.

    ``geometry/places.py`` has the places that belong to the rows.
    """
    proven: np.ndarray = (table == label).all(axis=1)
    return proven


def unchangeable(table: np.ndarray) -> bool:
    """Theorem 1 read backwards: is the whole table of a received image one label?

    Then both inferences answer that label on every image that differs from this one within one patch that the
    masks cover: the proof of Theorem 1 uses neither that the label is the true one nor that the image is
    clean. "Differs within one patch" is symmetric, so the image as it was before somebody put a patch on it
    is among them: no single patch changed this answer, and none can. One-mask labels that agree (case
    *agreed*) do not say that.
    """
    return two_mask_correct(table, int(table[0, 0])) and table[0, 0] != UNKNOWN


def forgeable(table: np.ndarray, label: int, defended: int) -> bool:
    """May some patch on this image lead to an answer other than ``label`` that is proven unchangeable?

    Args:
        table: of the clean image. label: its true label. defended: its answer, by either inference.

    If an image within one patch of this one has a table of nothing but z, then this one is answered z
    (:func:`unchangeable`), so z is ``defended``. And under a mask that hides the patch the two images are
    one, so the row of that mask is all z here too. Without a wrong answer and such a row, no proof can be
    forged.
    """
    return defended != label and bool(proven_rows(table, defended).any())
