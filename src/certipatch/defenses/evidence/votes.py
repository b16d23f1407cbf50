"""What the logits of windows say as integers: the evidence of each defense, rounded once.

Every function maps the logits (windows, classes) of a network to evidence of that shape, int64, row by row:
what one window says depends on its own logits. Computed in float64.

| function | defense | values |
|---|---|---|
| :func:`votes` | De-randomized Smoothing | 0 or 1, for each class alone |
| :func:`best_vote` | Smoothed ViT | one 1 a window |
| :func:`step` | BagCert | 0 or 1, for each class alone |
| :func:`clipped_tanh` | Clipped BagNet | -2^16 to 2^16 |
| :func:`positive` | PatchGuard on a BagNet | 0 to 2^20 |
| :func:`signed` | PatchCURE, where all of the network has limited sight | -2^20 to 2^20 |
| :func:`confidence` | PatchGuard on bands | 0 to 2^20 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ...errors import ConfigError, SoundnessError

TANH = 2**16  # steps in 1
SHARE = 2**20  # steps in 1
LOGIT, MOST = 2**10, 2**10  # steps in 1, and the largest logit that counts


@dataclass(frozen=True)
class Evidence:
    """One way to read logits, and how far logits may move before its integers do.

    Attributes:
        name: as it stands in a manifest; ``settings`` stand beside it.
        of: logits (windows, classes) -> evidence of that shape, int64.
        spread: the largest evidence minus the smallest, whatever a window shows; None without such a bound.
        sure: of votes, logits -> (windows,): by how many logits the difference of any two classes may move
            in a window before its votes change.
        steps: of evidence that moves with the logits: by how many integers at most, a logit.
    """

    name: str
    of: Callable[[np.ndarray], np.ndarray]
    spread: int | None = None
    sure: Callable[[np.ndarray], np.ndarray] | None = None
    steps: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def votes(logits: np.ndarray, *, theta: float) -> np.ndarray:
    """1 for each class whose confidence is at least theta: none, one or several a window.

    Raises ConfigError for a theta outside [0, 1].
    """
    if not 0 <= theta <= 1:  # NaN is not either
        raise ConfigError(f"theta {theta:g}: expected a confidence from 0 to 1")
    return (_softmax(logits) >= theta).astype(np.int64)


def best_vote(logits: np.ndarray) -> np.ndarray:
    """1 for the class of the largest logit, the smallest of equals."""
    best = _checked(logits).argmax(axis=1)
    return (best[:, None] == np.arange(logits.shape[1])).astype(np.int64)


def step(logits: np.ndarray) -> np.ndarray:
    """1 for each class whose logit is above 0."""
    return (_checked(logits) > 0).astype(np.int64)


def clipped_tanh(logits: np.ndarray) -> np.ndarray:
    """tanh(0.05 z - 1) in steps of 2^-16."""
    return _rounded(np.tanh(0.05 * _checked(logits) - 1) * TANH)


def positive(logits: np.ndarray) -> np.ndarray:
    """Logits from 0 to 2^10, others clipped, in steps of 2^-10."""
    return _rounded(_checked(logits).clip(0, MOST) * LOGIT)


def signed(logits: np.ndarray) -> np.ndarray:
    """Logits from -2^10 to 2^10, others clipped, in steps of 2^-10."""
    return _rounded(_checked(logits).clip(-MOST, MOST) * LOGIT)


def confidence(logits: np.ndarray) -> np.ndarray:
    """The softmax of each window in steps of 2^-20."""
    return _rounded(_softmax(logits) * SHARE)


def _sure_of_best(logits: np.ndarray) -> np.ndarray:
    """The best logit minus the second best."""
    second, best = np.partition(_checked(logits), -2, axis=1)[:, -2:].T
    return np.asarray(best - second)


def _sure_of_step(logits: np.ndarray) -> np.ndarray:
    """How near the nearest class is to 0. (Each logit by itself counts, not a difference.)"""
    return np.asarray(np.abs(_checked(logits)).min(axis=1))


def _sure_of_votes(logits: np.ndarray, *, theta: float) -> np.ndarray:
    """How near the nearest class is to theta, where a confidence p is at log(p / (1 - p)) logits: that moves
    by no more than the differences of logits do."""
    odds = [_log_odds(_checked(logits), theta, c) for c in range(logits.shape[1])]
    return np.asarray(np.abs(odds).min(axis=0))


def _log_odds(logits: np.ndarray, theta: float, label: int) -> np.ndarray:
    """By how many logits a class is above theta, in each window; infinite where all or none are."""
    others = np.delete(logits, label, axis=1)
    most = others.max(axis=1)
    lead = logits[:, label] - most - np.log(np.exp(others - most[:, None]).sum(axis=1))
    return np.asarray(lead - _log_odds_of(theta))


def _log_odds_of(theta: float) -> float:
    """log(theta / (1 - theta)). At 1 it is where float64 rounds a confidence to 1."""
    with np.errstate(divide="ignore"):
        return float(np.log(theta) - np.log(max(1 - theta, 2.0**-53)))


def threshold_votes(theta: float) -> Evidence:
    """The evidence of De-randomized Smoothing. Raises ConfigError for a theta outside [0, 1]."""
    votes(np.zeros((1, 2)), theta=theta)
    sure = partial(_sure_of_votes, theta=theta)
    return Evidence("votes", partial(votes, theta=theta), 1, sure, settings={"theta": theta})


BEST_VOTE = Evidence("best-vote", best_vote, 1, _sure_of_best)
STEP = Evidence("step", step, 1, _sure_of_step)
CLIPPED_TANH = Evidence("clipped-tanh", clipped_tanh, 2 * TANH, steps=0.05 * TANH)
POSITIVE = Evidence("positive", positive, steps=LOGIT)
SIGNED = Evidence("signed", signed, steps=LOGIT)
CONFIDENCE = Evidence("confidence", confidence, SHARE, steps=SHARE / 4)


def _softmax(logits: np.ndarray) -> np.ndarray:
    logits = _checked(logits)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.int64)


def _checked(logits: np.ndarray) -> np.ndarray:
    """The logits in float64.

    Raises SoundnessError if they are no floats (windows, 2 or more classes), or not all finite: an attacker
    may cause an error, but no answer.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or logits.dtype.kind != "f":
        raise SoundnessError(
            f"logits: expected floats (windows, 2 or more classes), found {logits.dtype} {logits.shape}"
        )
    if not np.isfinite(logits).all():
        raise SoundnessError(
            "logits: expected finite numbers, found NaN or infinity; check the weights and the precision"
        )
    return np.ascontiguousarray(logits, dtype=np.float64)
