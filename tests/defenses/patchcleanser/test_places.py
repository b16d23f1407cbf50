"""Certificates by place: the schedule asks for what the rows need and no more, and the rows that it finds are
those of the full table, on random tables and around a network.

That no attack at a proven place succeeds is in test_places_theorem.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from certipatch import PatchCleanser
from certipatch.defenses.patchcleanser.algorithms import INFERENCES, UNKNOWN, answer, proven_rows
from certipatch.defenses.patchcleanser.schedule import Schedule, missing_in_rows
from networks import Views, keeps_of, mask_set, naive, naive_view, network, pictures, true_labels
from tables import many, random_table, start, tables

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(table, label):
    """The rows of a full table that are all ``label``, one entry at a time."""
    return [all(entry == label for entry in row) for row in np.asarray(table).tolist()]


def matters(known, label, i, j):
    """Whether a pair lies in a row in which nothing known is wrong."""
    return any(all(entry in (label, UNKNOWN) for entry in known[row].tolist()) for row in (i, j))


def reveal(table, label, rng, *, size, inference="double-masking", exhaustive=False):
    """Play the network for one image. Returns what the schedule asked for, and how many answers were asked
    for while no row of theirs was open any more."""
    n = len(table)
    schedule = Schedule(np.zeros((n, n), bool), inference=inference, exhaustive=exhaustive, places=True)
    known, idle = start(table), 0
    schedule.add(0, known, label, rng.random((n, n)))
    while schedule.images:
        views, _ = schedule.next(size)
        assert views
        idle += sum(not matters(known, label, i, j) for _, i, j in views)
        schedule.tell(views, [table[i, j] for _, i, j in views])
    return known, idle


@many
@given(
    tables(),
    st.integers(0, 2),
    st.integers(0, 2**32),
    st.sampled_from(INFERENCES),
    st.integers(1, 12),
    st.booleans(),
)
def test_rows_are_those_of_the_full_table(table, label, seed, inference, size, exhaustive):
    known, _ = reveal(
        table, label, np.random.default_rng(seed), size=size, inference=inference, exhaustive=exhaustive
    )
    assert ((known == table) | (known == UNKNOWN)).all()
    assert proven_rows(known, label).tolist() == rows_of(table, label)
    assert answer(known, inference) == answer(table, inference)
    assert (known == label).all() == oracle.certified(table.tolist(), label)


def test_no_pair_is_asked_for_that_no_open_row_needs():
    """One view at a time, every pair lies in an open row when it is asked for, unless the answer needs it."""
    rng, some, left = np.random.default_rng(0), 0, 0
    for _ in range(1500):
        table = random_table(rng, most=8)
        label = int(table[0, 0])
        if (table.diagonal() != label).any():
            continue  # then the inference asks for pairs of its own
        known, idle = reveal(table, label, rng, size=1)
        assert idle == 0
        wrong = rows_of(table, label).count(False)
        some += 0 < wrong < len(table)
        left += (known == UNKNOWN).any()
    assert some >= 50
    assert left >= 20, "often not every pair is needed"


def test_what_ends_rows():
    table = np.full((4, 4), UNKNOWN)
    np.fill_diagonal(table, [1, 1, 1, 7])
    missing = missing_in_rows(table, 1).tolist()
    assert missing == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], (
        "the pairs with mask 3 matter to others"
    )
    table[0, 1] = table[1, 0] = 7
    assert missing_in_rows(table, 1).tolist() == [[0, 2], [1, 2], [2, 3]], "a wrong pair ends two rows"
    table[2, 3] = table[3, 2] = 7
    assert missing_in_rows(table, 1).tolist() == [], "and without an open row nothing is missing"
    assert missing_in_rows(table, 7).tolist() == [[0, 3], [1, 3]], "for its own label mask 3 has an open row"


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize(("seed", "k", "batch_size"), [(3, 3, 1), (4, 3, 7), (5, 3, 64), (4, 6, 64)])
def test_equals_one_view_at_a_time(seed, k, batch_size, inference):
    """Rows, certificates, answers and the smallest margin of each row; passes are those of the model."""
    model, images, labels, keeps = network(seed), pictures(seed, k), true_labels(seed, k), keeps_of(k)
    views = Views(model)
    options = {"batch_size": batch_size, "inference": inference}
    defense = PatchCleanser(model, mask_set(k), places=True, **options)
    views.forget()
    verdicts = defense.certify(images, labels)
    assert views.seen == sum(verdict.passes for verdict in verdicts)
    plain = PatchCleanser(model, mask_set(k), **options).certify(images, labels)
    some = 0
    for image, verdict, other, label, (_, table, _) in zip(
        images, verdicts, plain, labels.tolist(), naive(seed, k), strict=True
    ):
        rows = rows_of(table, label)
        assert verdict.proven == "".join(str(int(row)) for row in rows)
        assert (verdict.certified, verdict.defended_label, verdict.case) == (
            other.certified,
            other.defended_label,
            other.case,
        )
        assert (other.proven, other.proven_margins) == (None, None)
        assert verdict.passes >= other.passes
        some += 0 < sum(rows) < len(rows)
        proven = [i for i, row in enumerate(rows) if row]
        for i, margin in list(zip(proven, verdict.proven_margins, strict=True))[:3]:
            smallest = min(naive_view(model, image, keeps[i] & keep)[1] for keep in keeps)
            assert margin == pytest.approx(smallest, abs=1e-5)
    assert some


def test_without_labels_nothing_more_is_asked_for():
    model, images = network(4), pictures(4)
    views = Views(model)
    plain, by_place = PatchCleanser(model, mask_set(3)), PatchCleanser(model, mask_set(3), places=True)
    views.forget()
    plain.predict(images)
    before = views.seen
    by_place.predict(images)
    assert views.seen == 2 * before
    assert all(
        verdict.proven is None for verdict in PatchCleanser(model, mask_set(3), places=True).examine(images)
    )


def test_proven_places_hold_under_random_patches():
    """On a network: at each proven place of images that are not certified, the answer is the true label."""
    from certipatch.geometry.places import proven_places

    model, images, labels, masks = network(4), pictures(4), true_labels(4, 3), mask_set(3)
    defense = PatchCleanser(model, masks, places=True)
    generator, attacked, truth = torch.Generator().manual_seed(0), [], []
    for image, verdict, label in zip(images, defense.certify(images, labels), labels, strict=True):
        if verdict.certified:
            continue
        (proven,) = proven_places(np.array([bit == "1" for bit in verdict.proven]), masks)
        for top, left in np.argwhere(proven).tolist():
            view = image.clone()
            view[:, top : top + 3, left : left + 3] = torch.randint(2, (3, 3, 3), generator=generator)
            attacked.append(view)
            truth.append(int(label))
    assert len(attacked) >= 20
    assert defense.predict(torch.stack(attacked)).tolist() == truth
