"""PatchCleanser's algorithms on tables of labels: equal to the papers', whatever is known so far."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from certipatch.defenses.patchcleanser.algorithms import (
    UNKNOWN,
    double_masking,
    majority_label,
    two_mask_correct,
)
from tables import CASES, decide, many, random_table, tables


def check_equals_oracle(table):
    assert np.array_equal(table, table.T)
    for label in range(3):
        assert two_mask_correct(table, label) is oracle.certified(table.tolist(), label)
    assert decide(table) == oracle.double_masking(table.tolist())
    return decide(table)[1]


@many
@given(tables())
def test_algorithms_equal_the_oracle(table):
    check_equals_oracle(table)


def test_algorithms_equal_the_oracle_in_every_case():
    """The same on 4000 tables of a fixed seed, where each case of Algorithm 1 is known to occur."""
    rng = np.random.default_rng(0)
    cases = [check_equals_oracle(random_table(rng)) for _ in range(4000)]
    assert min(cases.count(case) for case in CASES) >= 300
    assert set(cases) == CASES


def test_the_certificate_looks_at_every_pair():
    """One wrong label anywhere, on the diagonal or off it, ends the certificate."""
    for n in (1, 2, 5):
        right = np.full((n, n), 7)
        assert two_mask_correct(right, 7)
        for i in range(n):
            for j in range(i, n):
                wrong = right.copy()
                wrong[i, j] = wrong[j, i] = 3
                assert not two_mask_correct(wrong, 7)


@pytest.mark.parametrize(
    ("first_round", "label"), [([4], 4), ([2, 1], 1), ([3, 3, 0, 0], 0), ([5, 2, 2], 2), ([9, 8, 9, 8, 7], 8)]
)
def test_majority(first_round, label):
    """Ties: the smallest label."""
    assert majority_label(first_round) == label
    assert majority_label(np.array(first_round)) == label


def test_the_second_round_is_asked_for_disagreers_only():
    """A live model pays for each row it is asked for: none if all agree, then the disagreers until one is
    unanimous."""

    def asked(table):
        rows = []
        double_masking(np.diagonal(table).tolist(), lambda i: (rows.append(i), table[i])[1])
        return rows

    assert asked([[1, 0], [0, 1]]) == []
    assert asked([[1, 1, 1, 2], [1, 2, 1, 1], [1, 1, 1, 1], [2, 1, 1, 2]]) == [1, 3]
    assert asked([[2, 2, 2, 2], [2, 0, 0, 0], [2, 0, 3, 0], [2, 0, 0, 0]]) == [0]


@settings(many, max_examples=200)
@given(tables(), st.data())
def test_what_is_not_known_never_certifies(table, data):
    """Forget any entries of any table, a wholly correct one included: no label is certified."""
    n = len(table)
    forgotten = data.draw(st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), min_size=1))
    for known in (table.copy(), np.ones_like(table)):
        for i, j in forgotten:
            known[i, j] = known[j, i] = UNKNOWN
        assert not any(two_mask_correct(known, label) for label in range(3))
