"""TODO."""

from __future__ import annotations

from collections import Counter
from typing import Any

Labels = dict[tuple[int, int], int]  # under masks i <= j


def double_masking_restated(first: list[int], second: Any) -> tuple[int, str]:
    """Algorithm 1, restated: the answer, and the case that decided. ``second(i)`` lists the labels under mask
    i and each mask."""
    votes = Counter(first)
    majority = min(votes, key=lambda label: (-votes[label], label))
    if len(votes) == 1:
        return majority, "agreed"
    for i, label in enumerate(first):
        if label != majority and set(second(i)) == {label}:
            return label, "disagreer"
    return majority, "majority"


def challenger_restated(first: list[int], pair: Any) -> tuple[int, str]:
    """Challenger masking, restated: the answer, and the case that decided. ``pair(i, j)`` is the label under
    both masks."""
    if len(set(first)) == 1:
        return first[0], "agreed"
    out, champion = set(), 0
    while len({label for i, label in enumerate(first) if i not in out}) > 1:
        challenger = min(i for i, label in enumerate(first) if i not in out and label != first[champion])
        if pair(champion, challenger) == first[challenger]:
            out.add(champion)
            champion = challenger
        else:
            out.add(challenger)
    return first[champion], "champion"


def _double_masked(labels: Labels, n: int) -> tuple[int, str]:
    return double_masking_restated(
        [labels[i, i] for i in range(n)], lambda i: [labels[min(i, j), max(i, j)] for j in range(n)]
    )


def _challenged(labels: Labels, n: int) -> tuple[int, str]:
    return challenger_restated([labels[i, i] for i in range(n)], lambda i, j: labels[min(i, j), max(i, j)])
