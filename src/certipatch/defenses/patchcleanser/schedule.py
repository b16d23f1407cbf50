"""Which views are looked at next: no view that cannot matter, and first those that are likely to decide.

The schedule works on integers only. Its outcome is that of the full table (see ``algorithms.py``): a
certificate falls with its first wrong pair of masks, a row of Algorithm 1 with its first label that
disagrees, and of challenger masking only the games are asked for. The order decides only how soon such an
answer is met: pairs come in the order of the two masks' summed one-mask margins, smallest first.

By place, the proven rows are asked for too. A row ends with its first wrong label, so a wrong pair ends two
rows; a mask that is wrong alone ends its own, and in every other row nothing but the pair with it.

For a proof without a label every pair is asked for where the one-mask labels agree, whatever they say, until
one says otherwise; and of an image that is answered wrongly, rows until one is all of that answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ...geometry.masks import MaskPair
from .algorithms import UNKNOWN, Inference, answer, challenger_masking, majority_label

View = tuple[int, int, int]  # an image, and its masks i <= j


NOTHING: np.ndarray = np.empty((0, 2), dtype=np.int64)


def missing_pairs(
    table: np.ndarray,
    label: int | None,
    inference: Inference = "double-masking",
    *,
    places: bool = False,
    prove: bool = False,
) -> tuple[np.ndarray, int]:
    """The pairs (i <= j) that must still be known, and the label that each must have for the rest to matter.

    Returns an (n, 2) array and a label. The table's diagonal is known. For the certificate (``label`` given)
    one wrong entry decides; for Algorithm 1 a row decides as soon as one entry disagrees. Rows are asked for
    one at a time, in the order in which Algorithm 1 looks at them; of challenger masking the next game, since
    its outcome decides who plays then. Nothing is missing when everything is decided.

    Args:
        places: the proven rows of ``label`` must be known as well; without a label, of the answer.
        prove: it must be known whether the answer is unchangeable; and, with a label, forgeable.
    """
    if places and label is not None:
        of_rows = missing_in_rows(table, label)
        if len(of_rows):
            return of_rows, label
    pairs, expected = _missing_for_the_answer(table, label, inference, prove=prove)
    if len(pairs) or not (prove or places):
        return pairs, expected
    defended, _ = answer(table, inference)
    if label is None:
        return missing_in_rows(table, defended) if places else NOTHING, defended
    return missing_for_forgery(table, label, defended) if prove else NOTHING, defended


def _missing_for_the_answer(
    table: np.ndarray, label: int | None, inference: Inference, *, prove: bool
) -> tuple[np.ndarray, int]:
    """What :func:`missing_pairs` asks for until answer and certificate, or proof, are known."""
    first_round = table.diagonal()
    agreed = int(first_round[0]) if (first_round == first_round[0]).all() else None
    if agreed is not None and (prove or agreed == label):
        # The defended label is settled (agreed); certificate and proof need every pair, or one wrong one.
        if ((table != agreed) & (table != UNKNOWN)).any():
            return NOTHING, agreed
        return np.argwhere(np.triu(table == UNKNOWN)), agreed
    if inference == "challenger":
        return next_game(table), UNKNOWN
    majority = majority_label(first_round)
    for i in np.flatnonzero(first_round != majority):
        known = table[i] != UNKNOWN
        if (table[i][known] != first_round[i]).any():
            continue  # this disagreer has been outvoted
        others = np.flatnonzero(~known)
        return np.sort(np.stack([np.full_like(others, i), others], axis=1), axis=1), int(first_round[i])
    return NOTHING, majority


def missing_for_forgery(table: np.ndarray, label: int, defended: int) -> np.ndarray:
    """The unknown pairs (i <= j) of a row that may be all of a wrong answer, as an array (n, 2); (0, 2) if
    there is such a row already, or there can be none."""
    same = table == defended
    if defended == label or same.all(axis=1).any():
        return NOTHING
    open_rows = np.flatnonzero((same | (table == UNKNOWN)).all(axis=1))
    for i in open_rows[:1]:
        others = np.flatnonzero(table[i] == UNKNOWN)
        return np.sort(np.stack([np.full_like(others, i), others], axis=1), axis=1)
    return NOTHING


def missing_in_rows(table: np.ndarray, label: int) -> np.ndarray:
    """The unknown pairs (i <= j) of rows in which everything known is ``label``, as an array (n, 2)."""
    unknown = table == UNKNOWN
    open_rows = (unknown | (table == label)).all(axis=1)
    return np.argwhere(np.triu(unknown & (open_rows[:, None] | open_rows)))


def next_game(table: np.ndarray) -> np.ndarray:
    """The first pair that challenger masking asks for and that is not known yet, as an array (1, 2).

    The array is (0, 2) if challenger masking has its answer.
    """
    unknown: list[MaskPair] = []

    def pair(i: int, j: int) -> int:
        if table[i, j] == UNKNOWN:
            unknown.append((min(i, j), max(i, j)))
        return int(table[i, j])

    # What challenger masking does beyond the first unknown pair is of no interest.
    challenger_masking(table.diagonal().tolist(), pair)
    return np.array(unknown[:1], dtype=np.int64).reshape(-1, 2)


@dataclass
class _Image:
    """An undecided image: its table and label, and the pairs to ask for.

    ``order`` (masks, masks) is small for pairs to ask for early; ``expected`` is the label that the pairs
    must have for the rest to matter; ``queues`` are the pairs that are not apart and those that are.
    """

    table: np.ndarray
    label: int | None
    order: np.ndarray
    expected: int = UNKNOWN
    queues: tuple[deque[MaskPair], deque[MaskPair]] = field(default_factory=lambda: (deque(), deque()))

    def next_is_apart(self) -> bool:
        near, apart = self.queues
        return bool(apart) and (not near or bool(self.order[apart[0]] < self.order[near[0]]))


def _queue(pairs: np.ndarray) -> deque[MaskPair]:
    return deque((i, j) for i, j in pairs.tolist())


class Schedule:
    """The undecided images and what is to be asked about each.

    Args:
        apart: (masks, masks) bool: pairs that are looked at in another way than the rest, so in batches of
            their own.
        exhaustive: ask for every pair, also where the answer is settled.
        inference: how the defended label is found.
        places: ask for what the proven rows need too.
        prove: ask for what proofs without a label need too.
    """

    def __init__(
        self,
        apart: np.ndarray,
        *,
        exhaustive: bool = False,
        inference: Inference = "double-masking",
        places: bool = False,
        prove: bool = False,
    ) -> None:
        self.apart, self.exhaustive, self.inference = apart, exhaustive, inference
        self.places, self.prove = places, prove
        self.images: dict[int, _Image] = {}

    def add(self, image: int, table: np.ndarray, label: int | None, order: np.ndarray) -> bool:
        """Take on an image whose diagonal of the table (masks, masks) is known; is it undecided?

        ``order`` (masks, masks) is small for pairs to ask for early. Answers are written into the table.
        """
        self.images[image] = _Image(table, label, order)
        return self._refill(image)

    def next(self, size: int) -> tuple[list[View], bool]:
        """Up to ``size`` views, and whether their masks are apart; none if no image is undecided.

        The images take turns, so that few pairs of one image are under way when one of them decides it.
        """
        turn = list(self.images)[:size]
        votes = sum(self.images[image].next_is_apart() for image in turn)
        apart = 2 * votes > len(turn)  # as most of the images would have it
        views: list[View] = []
        while any(one.queues[apart] for one in self.images.values()) and len(views) < size:
            for image, one in self.images.items():
                if one.queues[apart] and len(views) < size:
                    views.append((image, *one.queues[apart].popleft()))
        return views, apart

    def tell(self, views: Iterable[View], labels: Iterable[int]) -> list[int]:
        """Note the labels of views. Returns the images that are decided now."""
        surprised, asked = set(), {}
        for (image, i, j), label in zip(views, labels, strict=True):
            one = self.images[image]
            one.table[i, j] = one.table[j, i] = label
            asked[image] = one
            if label != one.expected:
                surprised.add(image)
        return [
            image
            for image, one in asked.items()
            if ((image in surprised and not self.exhaustive) or not any(one.queues))
            and not self._refill(image)
        ]

    def _refill(self, image: int) -> bool:
        one = self.images[image]
        if self.exhaustive:
            pairs = np.argwhere(np.triu(one.table == UNKNOWN))
        else:
            pairs, one.expected = missing_pairs(
                one.table, one.label, self.inference, places=self.places, prove=self.prove
            )
        if not len(pairs):
            del self.images[image]
            return False
        pairs = pairs[np.argsort(one.order[pairs[:, 0], pairs[:, 1]], kind="stable")]
        apart = self.apart[pairs[:, 0], pairs[:, 1]]
        one.queues = _queue(pairs[~apart]), _queue(pairs[apart])
        return True
