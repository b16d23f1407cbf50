"""Evidence and its rules as the papers say them, a window and a class at a time.

Nothing here comes from ``defenses.evidence``, whose integers and certificates are checked by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import exp, log, tanh

import numpy as np

from .algorithms import double_masking_restated
from .findings import Experiment
from .sights import Sights


def _votes(logits: np.ndarray, experiment: Experiment) -> list[int]:
    return [int(share >= experiment["theta"]) for share in _softmax(logits)]


def _best_vote(logits: np.ndarray, experiment: Experiment) -> list[int]:
    best = max(range(len(logits)), key=lambda c: (logits[c], -c))
    return [int(c == best) for c in range(len(logits))]


def _confidence(logits: np.ndarray, experiment: Experiment) -> list[int]:
    return [round(share * 2**20) for share in _softmax(logits)]


def _step(logits: np.ndarray, experiment: Experiment) -> list[int]:
    return [int(z > 0) for z in logits]


def _clipped_tanh(logits: np.ndarray, experiment: Experiment) -> list[int]:
    return [round(tanh(0.05 * float(z) - 1) * 2**16) for z in logits]


def _positive(logits: np.ndarray, experiment: Experiment) -> list[int]:
    return [round(min(max(float(z), 0.0), 1024.0) * 1024) for z in logits]


def _signed(logits: np.ndarray, experiment: Experiment) -> list[int]:
    return [round(min(max(float(z), -1024.0), 1024.0) * 1024) for z in logits]


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


def _unsure_step(logits: np.ndarray, experiment: Experiment) -> float:
    return min(abs(float(z)) for z in logits)


# The rules: the answer, and what a label has to spare where a patch reaches a set of windows.


def _sum_answer(evidence: np.ndarray, sights: Sights) -> int:
    return int(evidence.sum(axis=0).argmax())


def _sum_slack(
    evidence: np.ndarray, label: int, reached: np.ndarray, sights: Sights, spread: int = 1
) -> list[int]:
    """By class: the lead of the label outside, less one spread of each window inside, less a tie."""
    outside, most = evidence[~reached].sum(axis=0), spread * int(reached.sum())
    return [int(outside[label] - outside[c]) - most - (c < label) for c in range(evidence.shape[1])]


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


def _two_mask_sums(evidence: np.ndarray, one: np.ndarray, sights: Sights) -> np.ndarray:
    """(masks, classes): what is left under a mask and each second one."""
    return np.array([evidence[~one & ~other].sum(axis=0) for other in sights.reached])


def _two_mask_answer(evidence: np.ndarray, sights: Sights) -> int:
    """Algorithm 1 on sums of evidence."""
    table = [[int(sums.argmax()) for sums in _two_mask_sums(evidence, one, sights)] for one in sights.reached]
    first = [row[i] for i, row in enumerate(table)]
    return double_masking_restated(first, lambda i: table[i])[0]


def _two_mask_slack(evidence: np.ndarray, label: int, reached: np.ndarray, sights: Sights) -> list[int]:
    """By class: the least lead of the label under this mask and any other, less a tie."""
    left = _two_mask_sums(evidence, reached, sights)
    leads = [left[:, label] - left[:, c] - (c < label) for c in range(evidence.shape[1])]
    return [int(lead.min()) for lead in leads]


@dataclass(frozen=True)
class Kind:
    """One defense: how its windows speak, and by which rule it answers.

    ``cells``: they are the cells of a network, which answers for all of them. ``spread``: of the bounded sum.
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
    cells: bool = False
    spread: int = 1


SUM = ("bounded-sum", _sum_answer, _sum_slack)
MASKING = ("robust-masking", _masked_answer, _masked_slack)
TWO = ("two-masks", _two_mask_answer, _two_mask_slack)
TANH_SPREAD = 2**17
TANH_SUM = partial(_sum_slack, spread=TANH_SPREAD)
KINDS = (
    Kind("ds", "votes", SUM[0], _votes, *SUM[1:], _unsure_votes),
    Kind("smoothed-vit", "best-vote", SUM[0], _best_vote, *SUM[1:], _unsure_best),
    Kind("patchguard", "confidence", MASKING[0], _confidence, *MASKING[1:], steps=2**18),
    Kind("patchguard", "positive", MASKING[0], _positive, *MASKING[1:], steps=2**10, cells=True),
    Kind("bagcert", "step", SUM[0], _step, *SUM[1:], _unsure_step, cells=True),
    Kind(
        "clipped-bagnet",
        "clipped-tanh",
        SUM[0],
        _clipped_tanh,
        SUM[1],
        TANH_SUM,
        steps=0.05 * 2**16,
        cells=True,
        spread=TANH_SPREAD,
    ),
    Kind("patchcure-srf", "signed", TWO[0], _signed, *TWO[1:], steps=2**10, cells=True),
)


def kind_of(name: str, experiment: Experiment) -> Kind:
    """How a defense of this name speaks: PatchGuard does on cells as on nothing else.

    Raises ValueError for windows that it does not have.
    """
    cells = str(experiment["windows"]).startswith("cells:")
    for kind in KINDS:
        if (kind.name, kind.cells) == (name, cells):
            return kind
    raise ValueError(f"windows {experiment['windows']!r} of {name}")
