"""Proofs without a label by exhaustion: a flagged answer is the answer on every image near the received one.

Worlds, classifiers and tables are those of test_theorem.py. Every image of a world is once the received one,
whether somebody has put a patch on it or not, and all images that differ from it within one patch are tried.

The twins must fail: with the flag on case *agreed* alone, and with one pair that says otherwise.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from certipatch.defenses.patchcleanser.algorithms import (
    INFERENCES,
    UNKNOWN,
    answer,
    forgeable,
    unchangeable,
)
from certipatch.defenses.patchcleanser.defense import PatchCleanser
from certipatch.defenses.patchcleanser.schedule import missing_pairs
from certipatch.geometry.masks import MaskSet
from defenses.patchcleanser.test_theorem import looks
from worlds import SHAPES, TWICE, WORLDS, random_classifier

SEEDS = 6  # classifiers in each world


def exhaust(world, classify, inference, flag=unchangeable):
    """Count flagged images, pairs of them and an image near with another answer, near images that are not
    flagged, and flagged answers that are wrong about a near original and were not called forgeable there."""
    images, tables = world.images, looks(world, world.masks, classify)
    answers = np.array([answer(table, inference)[0] for table in tables])
    flagged = np.array([flag(table) for table in tables])
    forged = np.array(  # by original and label: is a wrong proof near it foreseen?
        [
            [forgeable(table, label, said) for label in range(3)]
            for table, said in zip(tables, answers, strict=True)
        ]
    )
    counts = Counter(flagged=int(flagged.sum()), agreed=sum(len(set(t.diagonal())) == 1 for t in tables))
    for under, content in world.attacks():
        originals = images.copy()
        originals[:, under] = content
        near = world.number(originals)
        counts["changed"] += int((flagged & (answers[near] != answers)).sum())
        counts["original not flagged"] += int((flagged & ~flagged[near]).sum())
        for label in range(3):
            wrong = flagged & (answers != label)
            counts["forged"] += int(wrong.sum())
            counts["unforeseen"] += int((wrong & ~forged[near, label]).sum())
    counts["not forgeable"] = int((~forged).sum())
    return counts


def all_of(world, inference, **twin):
    counts = Counter()
    for seed in range(SEEDS):
        counts.update(exhaust(world, random_classifier(world, seed), inference, **twin))
    return counts


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("world", WORLDS + SHAPES + TWICE, ids=str)
def test_no_patch_changed_a_flagged_answer(world, inference):
    """Whatever the original was: its answer is the flagged one. The original itself need not be flagged."""
    counts = all_of(world, inference)
    assert counts["changed"] == counts["unforeseen"] == 0
    assert counts["flagged"] >= 10
    assert counts["flagged"] < counts["agreed"]
    assert counts["forged"] > 0
    assert counts["not forgeable"] > 0


def test_the_original_of_a_flagged_image_need_not_be_flagged():
    """So that may not be said of it."""
    assert sum(all_of(world, "double-masking")["original not flagged"] for world in WORLDS) > 0


def case_agreed(table):
    return len(set(table.diagonal().tolist())) == 1


def all_but_one_pair(table):
    """All one-mask labels agree, and of the pairs all but one."""
    return case_agreed(table) and int(np.triu(table != table[0, 0]).sum()) <= 1


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize(
    ("world", "twin"),
    [(world, case_agreed) for world in WORLDS + SHAPES + TWICE]
    + [(world, all_but_one_pair) for world in WORLDS],
    ids=lambda part: part.__name__ if callable(part) else str(part),
)
def test_twins(world, inference, twin):
    """One-mask labels that agree are not enough, and neither is a table in which one pair says otherwise."""
    changed = (
        exhaust(world, random_classifier(world, seed), inference, flag=twin)["changed"] for seed in range(60)
    )
    assert any(changed)


@pytest.mark.parametrize("inference", INFERENCES)
def test_the_schedule_asks_for_enough(inference):
    """On tables of few labels, asking only what is missing finds the flags of the full table; and no more is
    asked of an answer that is right and proven, or that is not agreed on and right."""
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(3000):
        masks = int(rng.integers(2, 7))
        full = rng.choice(3, p=[0.9, 0.07, 0.03], size=(masks, masks))
        full = np.triu(full) + np.triu(full, 1).T
        label = [None, 0, 1][int(rng.integers(3))]
        table = np.where(np.eye(masks, dtype=bool), full, UNKNOWN)
        while len(pairs := missing_pairs(table, label, inference, prove=True)[0]):
            i, j = pairs[0]
            table[i, j] = table[j, i] = full[i, j]
        said = answer(full, inference)
        assert answer(table, inference) == said
        assert unchangeable(table) == unchangeable(full) == bool((full == full[0, 0]).all())
        seen[f"unchangeable {unchangeable(table)}"] += 1
        if label is not None:
            whole = said[0] != label and bool((full == said[0]).all(axis=1).any())
            assert forgeable(table, label, said[0]) == forgeable(full, label, said[0]) == whole
            seen[f"forgeable {whole}"] += 1
    assert len(seen) == 4
    assert min(seen.values()) > 100


MASKS = MaskSet.covering(image_size=(8, 8), patch_size=(2, 2), masks_per_axis=3)


class Brightness(torch.nn.Module):
    """Two classes: is the mean of the image above a half? Its margin is as far as it is from there."""

    def forward(self, images):
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def images_of(*values):
    return torch.stack([torch.full((3, 8, 8), value) for value in values])


@pytest.mark.parametrize("inference", INFERENCES)
def test_predict_proven(inference):
    """All views of a bright or dark image say so; near the middle the margin is too small to count."""
    defense = PatchCleanser(Brightness().eval(), MASKS, fill=0.5, inference=inference)
    proven = defense.predict_proven(images_of(0.0, 1.0, 0.5005))
    assert proven.labels.tolist() == [0, 1, 1]
    assert proven.unchangeable.tolist() == [True, True, False]
    assert proven.margins[0] > 0.1 > 0.001 > proven.margins[2] > 0
    assert defense.predict_proven(images_of(0.5005), min_margin=0).unchangeable.tolist() == [True]
    assert defense.predict_proven(images_of(1.0), min_margin=9).unchangeable.tolist() == [False]
    labels, flags, margins = defense.predict_proven(torch.zeros(0, 3, 8, 8))
    assert len(labels) == len(flags) == len(margins) == 0


def test_verdicts_without_a_label_by_place():
    """Where a whole answer is not proven, some places of the patch are: here a lit corner decides alone."""

    class Corner(torch.nn.Module):
        def forward(self, images):
            lit = images[:, :, :2, :2].mean(dim=(1, 2, 3))
            return torch.stack([0.6 - lit, lit - 0.6], dim=1)

    defense = PatchCleanser(Corner().eval(), MASKS, fill=0.5)
    image = images_of(0.5)
    image[:, :, :2, :2] = 1.0
    (verdict,) = defense.examine_proven(image, places=True)
    assert (verdict.unchangeable, verdict.forgeable, verdict.certified) == (False, None, None)
    assert set(verdict.proven) == {"0", "1"} or set(verdict.proven) == {"0"}
    (plain,) = defense.examine(image)
    assert (plain.unchangeable, plain.proven) == (None, None)


def test_with_labels_the_verdict_knows_both():
    """A right answer that is proven is certified; a wrong one that is proven is forgeable; nothing else of
    the verdict differs from one without proofs, but passes and margin."""
    images, labels = images_of(0.0, 1.0), torch.tensor([0, 0])
    defense = PatchCleanser(Brightness().eval(), MASKS, fill=0.5, prove=True)
    right, wrong = defense.certify(images, labels)
    assert (right.certified, right.unchangeable, right.forgeable) == (True, True, False)
    assert (wrong.certified, wrong.unchangeable, wrong.forgeable) == (False, True, True)
    plain = PatchCleanser(Brightness().eval(), MASKS, fill=0.5).certify(images, labels)
    same = ("defended_label", "case", "certified", "failing_pair", "failing_label")
    for one, other in zip((right, wrong), plain, strict=True):
        assert [getattr(one, name) for name in same] == [getattr(other, name) for name in same]
        assert other.unchangeable is other.forgeable is None
    assert wrong.passes == 1 + 9 * 10 // 2 > plain[1].passes == 10
    assert defense.describe()["prove"] is True
