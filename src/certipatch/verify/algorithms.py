"""PatchCleanser's two inferences, written down a second time to check the first.

They are Algorithm 1 of the paper (double masking) and challenger masking, which its authors' code has.
Nothing here comes from ``defenses.patchcleanser``, whose answers are checked by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Labels = dict[tuple[int, int], int]  # the label under masks i <= j; i = j is one mask
Answer = tuple[int, str]  # the label, and the case that decided


def double_masking_restated(first: list[int], second: Any) -> Answer:
    """Algorithm 1 on the labels under each mask (``first``), and under mask i and each (``second(i)``)."""
    votes = Counter(first)
    majority = min(votes, key=lambda label: (-votes[label], label))
    if len(votes) == 1:
        return majority, "agreed"
    for i, label in enumerate(first):
        if label != majority and set(second(i)) == {label}:
            return label, "disagreer"
    return majority, "majority"


def challenger_restated(first: list[int], pair: Any) -> Answer:
    """Challenger masking on the labels under each mask (``first``), and under two masks (``pair(i, j)``)."""
    if len(set(first)) == 1:
        return first[0], "agreed"
    out, champion = set(), 0
    while True:
        others = [i for i, label in enumerate(first) if i not in out and label != first[champion]]
        if not others:
            return first[champion], "champion"
        challenger = others[0]
        if pair(champion, challenger) == first[challenger]:
            out.add(champion)
            champion = challenger
        else:
            out.add(challenger)


def _double_masked(labels: Labels, n: int) -> Answer:
    return double_masking_restated(
        [labels[i, i] for i in range(n)], lambda i: [labels[min(i, j), max(i, j)] for j in range(n)]
    )


def _challenged(labels: Labels, n: int) -> Answer:
    return challenger_restated([labels[i, i] for i in range(n)], lambda i, j: labels[min(i, j), max(i, j)])


def all_views(n: int) -> int:
    """The forward passes of the image, and of all its views under one and two of n masks."""
    return 1 + n * (n + 1) // 2


def _views_and_games(n: int) -> int:
    return min(all_views(n), 2 * n)  # each of at most n - 1 games puts a mask out


@dataclass(frozen=True)
class Inference:
    """One inference of PatchCleanser.

    Attributes:
        cases: what can have decided its answer.
        answer: the labels under n masks and pairs of them, and n -> the answer.
        most_passes: n masks, of which one alone answers wrong -> the most forward passes that an image takes.
    """

    cases: tuple[str, ...]
    answer: Callable[[Labels, int], Answer]
    most_passes: Callable[[int], int]


DOUBLE_MASKING = Inference(("agreed", "disagreer", "majority"), _double_masked, all_views)
CHALLENGER = Inference(("agreed", "champion"), _challenged, _views_and_games)
