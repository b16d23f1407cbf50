"""What a strategy costs: forward passes of search, and forward-equivalents with the gradient step.

Source: Greedy Cutout's cost model; a backward pass is worth two forward passes.
"""

from __future__ import annotations

from ..geometry.masks import MaskSet

FORWARD, BACKWARD = 1, 2


RANDOM = ("vanilla", "random-cutout", "random-coarse", "random-fine", "random-both")


SEARCHES = (
    "gutout-coarse",
    "gutout-fine",
    "gutout-both",
    "greedy-coarse",
    "greedy-fine",
    "greedy-multisize",
    "grid-coarse",
    "grid-fine",
)


SEARCHES_BY_LOSS = SEARCHES[3:]  # greedy and grid: they need no gradient


STRATEGY_NAMES = RANDOM + SEARCHES  # the names, for those who need no torch


TWO_COPIES = ("random-both", "gutout-both", "greedy-multisize")


def search_passes(masks: MaskSet) -> dict[str, int]:
    """Extra forward passes of search for one training image, by strategy (0 for those not listed).

    Grad-CAM's backward passes count like forward ones, as in the paper: 4 for each set. What is run may be
    less: one pass of greedy-multisize, whose loss is known, and epochs without a search. Records hold what
        was counted.
    """
    coarse, children = masks.coarsen()
    n, m = len(masks), len(coarse)
    return {
        "gutout-coarse": 4,
        "gutout-fine": 4,
        "gutout-both": 8,
        "greedy-coarse": 2 * m - 1,
        "greedy-fine": 2 * n - 1,
        "greedy-multisize": 2 * (m + len(children[0])),
        "grid-coarse": m * (m + 1) // 2,
        "grid-fine": n * (n + 1) // 2,
    }


def copies(strategy: str) -> int:
    """Masked copies of each image in the gradient step: the batch of that step is this many times as
    large."""
    return 2 if strategy in TWO_COPIES else 1


def forward_equivalents(strategy: str, masks: MaskSet) -> int:
    """Forward passes' worth of one training image in one epoch: search and gradient step."""
    return search_passes(masks).get(strategy, 0) + copies(strategy) * (FORWARD + BACKWARD)
