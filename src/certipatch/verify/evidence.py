"""Evidence and its rules as the papers say them, a window and a class at a time.

Nothing here comes from ``defenses.evidence``, whose integers and certificates are checked by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log

import numpy as np

from .findings import Experiment
from .sights import Sights


def _votes(logits: np.ndarray, experiment: Experiment) -> list[int]:
    return [int(share >= experiment["theta"]) for share in _softmax(logits)]


def _best_vote(logits: np.ndarray, experiment: Experiment) -> list[int]:
    best = max(range(len(logits)), key=lambda c: (logits[c], -c))
    return [int(c == best) for c in range(len(logits))]


def _confidence(logits: np.ndarray, experiment: Experiment) -> list[int]:
    return [round(share * 2**20) for share in _softmax(logits)]


def _softmax(logits: np.ndarray) -> list[float]:
    powers = [exp(float(z) - float(logits.max())) for z in logits]
    return [power / sum(powers) for power in powers]


def _unsure_votes(logits: np.ndarray, experiment: Experiment) -> float:
    """By how many logits the nearest class misses the threshold."""
    theta = experiment["theta"]
    if theta in (0, 1):
        return 0.0 if theta else np.inf
    at = log(theta / (1 - theta))
    odds = []
    for c in range(len(logits)):
        others = np.delete(logits, c).astype(np.float64)
        most = float(others.max())
        odds.append(float(logits[c]) - most - log(sum(exp(float(z) - most) for z in others)))
    return min(abs(one - at) for one in odds)


def _unsure_best(logits: np.ndarray, experiment: Experiment) -> float:
    second, best = np.sort(logits.astype(np.float64))[-2:]
    return float(best - second)


# The rules: the answer, and what a label has to spare where a patch reaches a set of windows.


def _sum_answer(evidence: np.ndarray, sights: Sights) -> int:
    return int(evidence.sum(axis=0).argmax())


def _sum_slack(evidence: np.ndarray, label: int, reached: np.ndarray, sights: Sights) -> list[int]:
    """By class: the lead of the label outside, less one vote of each window inside, less a tie."""
    outside = evidence[~reached].sum(axis=0)
    return [int(outside[label] - outside[c] - reached.sum() - (c < label)) for c in range(evidence.shape[1])]


def _masked_answer(evidence: np.ndarray, sights: Sights) -> int:
    return int(np.array([evidence[~mask].sum(axis=0) for mask in sights.reached]).min(axis=0).argmax())


def _masked_slack(evidence: np.ndarray, label: int, reached: np.ndarray, sights: Sights) -> list[int]:
    """By class: the least that a mask leaves the label outside, less the least that is left of the class
    under a mask over all that is reached, less a tie."""
    masks = sights.reached
    least = min(int(evidence[~mask & ~reached, label].sum()) for mask in masks)
    over = [evidence[~mask].sum(axis=0) for mask in masks if not (reached & ~mask).any()]
    upper = np.array(over).min(axis=0)
    return [int(least - upper[c] - (c < label)) for c in range(evidence.shape[1])]


@dataclass(frozen=True)
class Kind:
    """One defense: how its windows speak, and by which rule it answers.

    ``unsure``: by how many logits a window may move before its votes change; None where evidence moves with
    the logits, by at most ``steps`` a logit.
    """

    name: str
    evidence: str
    rule: str
    integers: Callable[[np.ndarray, Experiment], list[int]]
    answer: Callable[[np.ndarray, Sights], int]
    slack: Callable[[np.ndarray, int, np.ndarray, Sights], list[int]]
    unsure: Callable[[np.ndarray, Experiment], float] | None = None
    steps: float = 0.0


SUM = ("bounded-sum", _sum_answer, _sum_slack)
KINDS = (
    Kind("ds", "votes", SUM[0], _votes, *SUM[1:], _unsure_votes),
    Kind("smoothed-vit", "best-vote", SUM[0], _best_vote, *SUM[1:], _unsure_best),
    Kind(
        "patchguard", "confidence", "robust-masking", _confidence, _masked_answer, _masked_slack, steps=2**18
    ),
)
