"""The theorem by exhaustion: on tiny worlds no patch, of any content and at any place, changes a certified
answer.

A world is every image of a few pixels and values, and a classifier is a random look-up table of masked
images. An attacked image is itself an image of the world, so every image is defended once, and an attack is a
look-up. The masks and both algorithms are the library's; the patches are tried here, one by one.

The twins must fail: with one mask taken away, for a patch larger or of another shape than the masks were made
for, for two patches where they were made for one, or with a certificate from fewer views, attacks succeed.
"""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import oracle
from certipatch.defenses.patchcleanser.algorithms import INFERENCES, answer, two_mask_correct
from worlds import LABELS, SHAPES, TWICE, WORLDS, random_classifier, wary_classifier

CASES = {"double-masking": {"agreed", "disagreer", "majority"}, "challenger": {"agreed", "champion"}}
SEEDS = 12  # classifiers in each world


def looks(world, masks, classify):
    """The table (masks, masks) of every image."""
    images = world.images
    keeps = [
        oracle.keep_of(world.image, [(w.top, w.left, w.height, w.width) for w in mask]).ravel()
        for mask in masks.windows
    ]
    tables = np.empty((len(images), len(masks), len(masks)), dtype=np.int64)
    for (i, a), (j, b) in product(enumerate(keeps), repeat=2):
        tables[:, i, j] = classify(np.where(a & b, images, world.fill))
    return tables


def exhaust(world, masks, classify, certify=two_mask_correct, inference="double-masking"):
    """Attack every image in every way and count.

    Returns the numbers of certified images; of attacks on them, by the case of the inference that answered;
    of attacks on them that changed the answer (broken); and of attacks on the other images that did.
    """
    images, tables = world.images, looks(world, masks, classify)
    answers, cases = zip(*(answer(table, inference) for table in tables), strict=True)
    answers, cases = np.array(answers), np.array(cases)
    certificates = np.array([[certify(table, label) for label in range(LABELS)] for table in tables])
    certified = certificates.any(axis=1)
    truth = np.where(certified, certificates.argmax(axis=1), answers)
    counts = Counter(certified=int(certified.sum()))
    for pixels, content in world.attacks():
        attacked = images.copy()
        attacked[:, pixels] = content
        at = world.number(attacked)
        broken = answers[at] != truth
        counts["broken"] += int((broken & certified).sum())
        counts["others broken"] += int((broken & ~certified).sum())
        counts.update(cases[at[certified]].tolist())
    return counts


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("world", WORLDS + SHAPES + TWICE, ids=str)
def test_no_attack_on_a_certified_image_succeeds(world, inference):
    """The theorem; and what makes the test worth its name: all cases answer, and uncertified images do
    break."""
    counts = Counter()
    for seed in range(SEEDS):
        counts.update(exhaust(world, world.masks, random_classifier(world, seed), inference=inference))
    assert counts["broken"] == 0
    assert counts["certified"] >= 300
    assert min(counts[case] for case in CASES[inference]) >= 20
    assert counts["others broken"] >= 50


def some_attack_succeeds(world, masks, **options):
    """Is any certified image broken, by any attack, for any of many classifiers?"""
    return any(
        exhaust(world, masks, random_classifier(world, seed), **options)["broken"] for seed in range(60)
    )


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_twin_with_a_mask_less(world, inference):
    """Every mask is needed: whichever is dropped, some patch is covered by no mask, and some certificate is
    false."""
    masks = world.masks
    for i in range(len(masks)):
        fewer = replace(masks, windows=masks.windows[:i] + masks.windows[i + 1 :], grid=None)
        assert fewer.uncovered_patch(world.patch) is not None
        assert some_attack_succeeds(world, fewer, inference=inference), f"without mask {i}"


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_twin_with_a_larger_patch(world):
    """Masks made for one patch promise nothing about a wider one that they do not cover."""
    masks, (height, width) = world.masks, world.patch
    wider = next(
        (height, w) for w in range(width + 1, world.image[1] + 1) if masks.uncovered_patch((height, w))
    )
    assert some_attack_succeeds(replace(world, patch=wider), masks)


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_twin_with_one_mask_views_only(world, inference):
    """The certificate needs the two-mask views: one-mask views that are all right do not suffice."""
    certify = lambda table, label: bool((table.diagonal() == label).all())  # noqa: E731
    assert some_attack_succeeds(world, world.masks, certify=certify, inference=inference)


def breaks(world, masks):
    """Whether the masks, which are not the world's, leave a hole; if so, certified images break."""
    hole = replace(
        masks, patch_size=world.patch, other_patch_sizes=world.others, patches=world.patches
    ).uncovered_patches()
    assert hole is None or exhaust(world, masks, wary_classifier(world, hole))["broken"] > 0
    return hole is not None


@pytest.mark.parametrize("world", SHAPES + TWICE, ids=str)
def test_twin_with_a_mask_less_of_several_shapes_or_two_patches(world):
    """Masks are needed here too; in worlds as tiny as these some happen to cover what another was made
    for."""
    masks = world.masks
    fewer = [replace(masks, windows=masks.windows[:i] + masks.windows[i + 1 :]) for i in range(len(masks))]
    assert sum(breaks(world, some) for some in fewer) >= len(masks) / 3


@pytest.mark.parametrize("world", SHAPES, ids=str)
def test_twin_with_the_masks_of_another_shape(world):
    """Masks for one of the shapes promise nothing about the other."""
    assert any(
        breaks(world, replace(world, patch=shape, others=()).masks) for shape in (world.patch, *world.others)
    )


@pytest.mark.parametrize("world", TWICE, ids=str)
def test_twin_with_the_masks_for_one_patch(world):
    """Masks for one patch, which certify against one, promise nothing about two."""
    assert breaks(world, replace(world, patches=1).masks)
