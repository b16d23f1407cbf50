"""The rule of the toy defense: columns of the image vote, and a patch reaches few of them. Integers only."""

from __future__ import annotations

from itertools import pairwise


def bands_of(width: int, bands: int) -> list[tuple[int, int]]:
    """The first and the last column + 1 of each band; together they are all columns."""
    edges = [width * band // bands for band in range(bands + 1)]
    return list(pairwise(edges))


def reached(width: int, bands: int, patch_width: int) -> int:
    """The most bands that a patch of that width can touch, wherever it is."""
    places = range(width - patch_width + 1)
    touched = (
        sum(left < end and start < left + patch_width for start, end in bands_of(width, bands))
        for left in places
    )
    return max(touched)


def winner(votes: list[int]) -> int:
    """The label with most votes; ties: the smallest."""
    return max(range(len(votes)), key=lambda label: (votes[label], -label))


def slack(votes: list[int], label: int, most: int) -> int:
    """How many more votes the label has than it needs; certified if this is 0 or more.

    A patch that reaches ``most`` bands takes as many votes from the label and gives them to another. The
    label still wins if it has that many more votes twice over, and one more against a smaller label, which
    wins ties.
    """
    others = (other for other in range(len(votes)) if other != label)
    return min(votes[label] - votes[other] - 2 * most - (other < label) for other in others)
