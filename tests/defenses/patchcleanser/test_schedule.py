"""The schedule changes the cost and no answer: certificates and defended labels are those of the full
table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from certipatch.defenses.patchcleanser.algorithms import UNKNOWN, two_mask_correct
from certipatch.defenses.patchcleanser.schedule import Schedule, missing_pairs
from tables import CASES, decide, many, random_table, start, tables


def reveal(full, labels, rng, *, size, exhaustive):
    """Play the network for several images at once. Returns their tables as far as the schedule asked for
    them."""
    n = len(full[0])
    halves = rng.random((n, n)) < rng.choice([0, 0.5, 1])
    apart = np.triu(halves, 1) | np.triu(halves, 1).T
    schedule = Schedule(apart, exhaustive=exhaustive)
    known = [start(table) for table in full]
    undecided = {
        a
        for a, (table, label) in enumerate(zip(known, labels, strict=True))
        if schedule.add(a, table, label, rng.random((n, n)))
    }
    while schedule.images:
        assert set(schedule.images) == undecided
        views, kind = schedule.next(size)
        assert 0 < len(views) <= size, "an undecided image has something to ask"
        assert len(set(views)) == len(views)
        for a, i, j in views:
            assert i <= j, "a pair is asked for as i <= j"
            assert known[a][i, j] == UNKNOWN, "and once"
            assert apart[i, j] == kind, "a batch is of one kind"
            if labels[a] is not None:
                assert not two_mask_correct(known[a], labels[a]), "what is not known never certifies"
        undecided -= set(schedule.tell(views, [full[a][i, j] for a, i, j in views]))
    assert not undecided
    return known


def check(full, rng, exhaustive=False):
    for labels in (
        [None] * len(full),
        rng.integers(0, 3, len(full)).tolist(),
        [int(table[0, 0]) for table in full],
    ):
        known = reveal(full, labels, rng, size=int(rng.integers(1, 12)), exhaustive=exhaustive)
        for table, part, label in zip(full, known, labels, strict=True):
            assert ((part == table) | (part == UNKNOWN)).all()
            assert decide(part) == oracle.double_masking(table.tolist())
            if label is not None:
                assert two_mask_correct(part, label) is oracle.certified(table.tolist(), label)
            if exhaustive:
                assert (part == table).all()


@many
@given(tables(), st.integers(0, 2**32), st.booleans())
def test_answers_are_those_of_the_full_table(table, seed, exhaustive):
    check([table], np.random.default_rng(seed), exhaustive)


def test_answers_of_several_images():
    """The same for several images at once, where each case of Algorithm 1 is known to occur."""
    rng, cases = np.random.default_rng(1), []
    for _ in range(300):
        n = int(rng.integers(1, 7))
        full = [table for table in (random_table(rng) for _ in range(20)) if len(table) == n] or [
            np.zeros((n, n), np.int64)
        ]
        check(full, rng, exhaustive=bool(rng.random() < 0.2))
        cases += [decide(table)[1] for table in full]
    assert min(cases.count(case) for case in CASES) >= 50


def test_nothing_is_asked_that_is_settled():
    """All agree and no certificate is asked for; or one wrong pair has ended it: nothing more to know."""

    def missing(table, label):
        return missing_pairs(table, label)[0].tolist()

    agreed = np.full((4, 4), UNKNOWN)
    np.fill_diagonal(agreed, 1)
    assert missing(agreed, None) == []
    assert missing(agreed, 0) == [], "agreed on a wrong label"
    assert len(missing(agreed, 1)) == 6

    agreed[0, 2] = agreed[2, 0] = 5
    assert missing(agreed, 1) == []

    outvoted = agreed.copy()
    outvoted[3, 3] = 0
    assert missing(outvoted, None) == [[0, 3], [1, 3], [2, 3]]
    outvoted[1, 3] = outvoted[3, 1] = 1  # row 3 is not unanimous: the majority stands
    assert missing(outvoted, None) == []

    unanimous = np.full((5, 5), UNKNOWN)
    np.fill_diagonal(unanimous, [1, 1, 1, 2, 2])
    unanimous[3, :] = unanimous[:, 3] = 2  # row 3 has decided: row 4 is not looked at
    assert missing(unanimous, None) == missing(unanimous, 1) == []


def test_small_margins_come_first_and_images_take_turns():
    schedule, order = Schedule(np.zeros((4, 4), dtype=bool)), np.add.outer([3, 0, 2, 1], [3, 0, 2, 1]) + 0.0
    for image in range(3):
        known = np.full((4, 4), UNKNOWN)
        np.fill_diagonal(known, 1)
        schedule.add(image, known, 1, order)
    assert schedule.next(4) == ([(0, 1, 3), (1, 1, 3), (2, 1, 3), (0, 1, 2)], False)
    assert schedule.tell([(0, 1, 3), (1, 1, 3)], [1, 7]) == [1], "a wrong pair decides"
    assert [image for image, _, _ in schedule.next(3)[0]] == [0, 2, 0]


@pytest.mark.parametrize("most", [(0, 2), (0, 1)])
def test_a_batch_is_of_the_kind_that_most_images_have_next(most):
    apart = np.zeros((3, 3), dtype=bool)
    apart[0, 2] = apart[2, 0] = True
    schedule = Schedule(apart)
    for image, first in enumerate([(1, 2), most, most]):
        known, order = np.full((3, 3), UNKNOWN), np.zeros((3, 3))
        np.fill_diagonal(known, 1)
        order[first] = -1
        schedule.add(image, known, 1, order)
    views, kind = schedule.next(3)
    assert kind == apart[most]
    assert views[1:] == [(1, *most), (2, *most)]
