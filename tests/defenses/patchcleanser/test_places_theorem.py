"""The certificate by place by exhaustion: at a proven place no content of a patch changes the answer.

Worlds, classifiers and tables are those of test_theorem.py; the places are tried here one by one, with masks
of the oracle. Most claims are about images that are not certified, and about labels that are nobody's truth.

The twins must fail: with a row of which only the one-mask label is known, with a row that one pair does not
agree with, with a place that the mask hides all but one pixel of, and with one of two patches hidden.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement, product

import numpy as np
import pytest

import oracle
from certipatch.defenses.patchcleanser.algorithms import INFERENCES, answer, proven_rows, two_mask_correct
from certipatch.geometry.places import Places, proven_places
from defenses.patchcleanser.test_theorem import looks
from worlds import LABELS, SHAPES, TWICE, WORLDS, World, random_classifier

SEEDS = 6  # classifiers in each world


def hiding(world, placed):
    """(masks,) bool, by the oracle: which masks hide all that is placed."""
    patch = ~oracle.keep_of(world.image, placed)
    keeps = (
        oracle.keep_of(world.image, [(w.top, w.left, w.height, w.width) for w in mask])
        for mask in world.masks.windows
    )
    return np.array([not (keep & patch).any() for keep in keeps])


def exhaust(
    world, classify, inference, *, rule=lambda table, label: (table == label).all(axis=1), reach=hiding
):
    """Count the claims (an image, a label, a place), those on images that are not certified, and the contents
    under which a claim is wrong.

    Args:
        rule: the rows that are taken to be proven. reach: the masks that are taken to hide a place.
    """
    images, tables = world.images, looks(world, world.masks, classify)
    answers = np.array([answer(table, inference)[0] for table in tables])
    rows = np.array([[rule(table, label) for label in range(LABELS)] for table in tables])
    certified = np.array([[two_mask_correct(table, label) for label in range(LABELS)] for table in tables])
    pixels, counts = np.arange(images.shape[1]).reshape(world.image), Counter()
    shapes = (world.patch, *world.others)
    for placed in combinations_with_replacement(oracle.placements(world.image, shapes), world.patches):
        claimed = (rows & reach(world, placed)).any(axis=2)  # (images, labels)
        if not claimed.any():
            continue
        counts["claims"] += int(claimed.sum())
        counts["not certified"] += int((claimed & ~certified).sum())
        under = np.unique(
            np.concatenate([pixels[t : t + h, left : left + w].ravel() for t, left, h, w in placed])
        )
        for content in product(range(world.values), repeat=len(under)):
            attacked = images.copy()
            attacked[:, under] = content
            wrong = answers[world.number(attacked)][:, None] != np.arange(LABELS)
            counts["wrong"] += int((claimed & wrong).sum())
    return counts


def some_claim_is_wrong(world, inference, **twin):
    """Is any claim of a twin wrong, for any of many classifiers?"""
    return any(
        exhaust(world, random_classifier(world, seed), inference, **twin)["wrong"] for seed in range(60)
    )


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("world", WORLDS + SHAPES + TWICE, ids=str)
def test_no_content_at_a_proven_place_changes_the_answer(world, inference):
    """The theorem, for every label; and what makes it new: it speaks of images that are not certified."""
    counts = Counter()
    for seed in range(SEEDS):
        counts.update(exhaust(world, random_classifier(world, seed), inference, rule=proven_rows))
    assert counts["wrong"] == 0
    assert counts["claims"] >= 500
    assert counts["not certified"] >= 100


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("world", WORLDS + SHAPES + TWICE, ids=str)
def test_twin_with_the_one_mask_label_only(world, inference):
    """A mask that hides the patch and answers the label alone proves nothing."""
    assert some_claim_is_wrong(world, inference, rule=lambda table, label: table.diagonal() == label)


def all_but_one_pair(table, label):
    """Rows of which one pair may say something else."""
    return (table.diagonal() == label) & ((table != label).sum(axis=1) <= 1)


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("world", WORLDS + SHAPES + TWICE, ids=str)
def test_twin_with_a_pair_that_says_otherwise(world, inference):
    assert some_claim_is_wrong(world, inference, rule=all_but_one_pair)


def touching(world, placed):
    """Masks that hide some of what is placed, and not all of it."""
    patch = ~oracle.keep_of(world.image, placed)
    keeps = (
        oracle.keep_of(world.image, [(w.top, w.left, w.height, w.width) for w in mask])
        for mask in world.masks.windows
    )
    return np.array([bool((~keep & patch).any()) for keep in keeps])


def cuts(world):
    """Whether some mask hides a part of some patch only."""
    placed = oracle.placements(world.image, [world.patch])
    return any((touching(world, [one]) != hiding(world, [one])).any() for one in placed)


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("world", [*filter(cuts, WORLDS), *SHAPES, *TWICE], ids=str)
def test_twin_with_a_mask_that_hides_some_of_the_patch(world, inference):
    """Of two patches this is a mask that hides the one and not the other."""
    assert some_claim_is_wrong(world, inference, reach=touching)


@pytest.mark.parametrize("world", WORLDS + SHAPES + TWICE, ids=str)
def test_places_are_those_of_the_oracle(world):
    """Each place, or pair of places, and the share of them; all rows prove all places, and no row none."""
    rng, masks = np.random.default_rng(0), world.masks
    shapes, places = masks.patch_sizes, Places.of(masks.windows, masks.image_size, masks.threat)
    for part in (0, 0.2, 0.5, 0.8, 1):
        rows = rng.random(len(masks)) < part
        found, shares = proven_places(rows, masks), []
        for some, sizes in zip(found, combinations_with_replacement(shapes, world.patches), strict=True):
            for at in np.ndindex(some.shape):
                placed = [(*at[2 * n : 2 * n + 2], *size) for n, size in enumerate(sizes)]
                assert some[at] == bool((hiding(world, placed) & rows).any())
            shares.append(some.mean())
        assert places.share(rows) == pytest.approx(min(shares), abs=1e-12)
    assert places.share(np.ones(len(masks), bool)) == 1.0
    assert places.share(np.zeros(len(masks), bool)) == 0.0


@pytest.mark.parametrize("inference", INFERENCES)
def test_the_certificate_is_the_case_that_all_rows_are_proven(inference):
    """On any table; and where some row is proven, the clean answer is its label already."""
    world = World((3, 3), (1, 1), 2, values=2, fill=2)
    seen = Counter()
    for seed in range(SEEDS):
        for table in looks(world, world.masks, random_classifier(world, seed)):
            for label in range(LABELS):
                rows = proven_rows(table, label)
                assert rows.all() == two_mask_correct(table, label) == oracle.certified(table.tolist(), label)
                assert not rows.any() or answer(table, inference)[0] == label
                seen[("all" if rows.all() else "some" if rows.any() else "none")] += 1
    assert min(seen.values()) >= 50
    assert len(seen) == 3


def test_places_of_a_photograph_are_counted_fast_and_exactly():
    """Of 3 % of 224 pixels, and of two patches, whose pairs of places are too many to write down."""
    for world, masks in (
        (World((224, 224), (39, 39), 6, values=2, fill=0), 36),
        (World((224, 224), (39, 20), 3, values=2, fill=0, others=((20, 39),)), 18),
        (World((224, 224), (20, 20), 3, values=2, fill=0, patches=2), 36),
    ):
        places = Places.of(world.masks.windows, world.image, world.masks.threat)
        assert places.hidden.shape[1] == masks
        assert places.share(np.ones(masks, bool)) == 1.0
        assert 0 < places.share(np.arange(masks) < masks // 2) < 1
    one = replace(world, patches=1)
    first = Places.of(one.masks.windows, one.image, one.masks.threat)
    alone = first.share(np.arange(len(one.masks)) < 3)  # the masks of the first row of three
    both = np.array([{w.top for w in mask} == {0} for mask in world.masks.windows])
    assert places.share(both) == pytest.approx(alone**2)
