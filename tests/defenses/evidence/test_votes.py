"""Logits of windows as integers, against one class of one window at a time."""

from functools import partial
from math import exp, tanh

import numpy as np
import pytest

from certipatch.defenses.evidence.robust_masking import masked_label
from certipatch.defenses.evidence.sums import sum_slack
from certipatch.defenses.evidence.votes import best_vote, clipped_tanh, confidence, positive, step, votes
from certipatch.errors import ConfigError, SoundnessError


def share(row, c):
    return exp(row[c]) / sum(map(exp, row))


# Each function, what it says of class c of a row by the definition, and the spread that rule A is told.
KINDS = {
    "votes": (partial(votes, theta=0.3), lambda row, c: share(row, c) >= 0.3, 1),
    "best_vote": (best_vote, lambda row, c: row.index(max(row)) == c, 1),
    "step": (step, lambda row, c: row[c] > 0, 1),
    "clipped_tanh": (clipped_tanh, lambda row, c: round(2**16 * tanh(0.05 * row[c] - 1)), 2**17),
    "positive": (positive, lambda row, c: round(2**10 * min(max(row[c], 0), 2**10)), 2**20),
    "confidence": (confidence, lambda row, c: round(2**20 * share(row, c)), 2**20),
}


def some_logits(seed=0, windows=200, classes=5):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(windows, classes)) * rng.choice([0.5, 5, 40], size=(windows, 1))).astype(
        np.float32
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_entry_is_by_the_definition(kind):
    evidence, defined, _ = KINDS[kind]
    logits = some_logits()
    found = evidence(logits)
    assert found.dtype == np.int64
    assert found.tolist() == [[int(defined(row, c)) for c in range(5)] for row in logits.tolist()]
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_says_the_same_alone_and_in_company(kind):
    evidence, logits = KINDS[kind][0], some_logits(1, classes=7)
    alone = np.concatenate([evidence(row[None]) for row in logits])
    assert np.array_equal(evidence(logits), alone)
    assert np.array_equal(evidence(np.asfortranarray(logits)), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_no_logits_leave_the_spread(kind):
    """Whatever an attacker makes of a window, rule A's spread holds; robust masking takes what it wants."""
    evidence, _, spread = KINDS[kind]
    extreme = np.array([[3e38, -3e38], [-3e38, 3e38], [0, 0], [-0.0, 1e-38], [5e4, 5e4]], dtype=np.float32)
    found = evidence(extreme)
    assert found.max() - found.min() <= spread
    sum_slack(found, 0, np.eye(5, dtype=bool), spread)
    if kind in ("positive", "confidence"):
        masked_label(found, np.eye(5, dtype=bool))


def test_ties_and_thresholds_count_as_they_are_said_to():
    assert best_vote(np.zeros((1, 3))).tolist() == [[1, 0, 0]]
    assert step(np.zeros((1, 3))).tolist() == [[0, 0, 0]]
    assert votes(np.zeros((1, 4)), theta=0.25).tolist() == [[1, 1, 1, 1]]
    assert votes(np.zeros((1, 3)), theta=0).tolist() == [[1, 1, 1]]
    assert votes(np.array([[0.0, 9.0]]), theta=1).tolist() == [[0, 0]]


@pytest.mark.parametrize("theta", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_theta_that_is_no_confidence_is_refused(theta):
    with pytest.raises(ConfigError, match=r"theta .*: expected a confidence from 0 to 1"):
        votes(np.zeros((1, 3)), theta=theta)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused(kind, wrong):
    logits = some_logits()
    logits[3, 2] = wrong
    with pytest.raises(SoundnessError, match="finite"):
        KINDS[kind][0](logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logits", [np.zeros(3), np.zeros((2, 1)), np.zeros((2, 3), dtype=np.int64)])
def test_logits_of_another_form_are_refused(kind, logits):
    with pytest.raises(SoundnessError, match="floats"):
        KINDS[kind][0](logits)
