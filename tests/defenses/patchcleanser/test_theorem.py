"""The theorem by exhaustion: on tiny worlds no patch, of any content and at any place, changes a certified
answer.

A world is every image of a few pixels and values, and a classifier is a random look-up table of masked
images. An attacked image is itself an image of the world, so every image is defended once, and an attack is a
look-up. The masks and both algorithms are the library's; the patches are tried here, one by one.

The twins must fail: with one mask taken away, for a patch larger or of another shape than the masks were made
for, for two patches where they were made for one, or with a certificate from fewer views, attacks succeed.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, product

import numpy as np
import pytest

import oracle
from certipatch.defenses.patchcleanser.algorithms import INFERENCES, answer, two_mask_correct
from certipatch.geometry.masks import MaskSet

LABELS = 3
CASES = {"double-masking": {"agreed", "disagreer", "majority"}, "challenger": {"agreed", "champion"}}
SEEDS = 12  # classifiers in each world


@dataclass(frozen=True)
class World:
    """All images of ``image`` pixels with values 0 .. values-1; masked pixels have the value ``fill``."""

    image: tuple[int, int]
    patch: tuple[int, int]
    k: int
    values: int
    fill: int  # one of the values, or ``values`` itself: a colour that no pixel has
    others: tuple[tuple[int, int], ...] = ()  # shapes that the patch may have instead
    patches: int = 1  # at once

    def __str__(self):
        (height, width), (h, w) = self.image, self.patch
        shapes = "".join(f"+{h}x{w}" for h, w in self.others) + "-twice" * (self.patches == 2)
        return f"{height}x{width}-patch-{h}x{w}{shapes}-k{self.k}-values-{self.values}-fill-{self.fill}"

    @property
    def masks(self):
        return MaskSet.covering(
            image_size=self.image,
            patch_size=self.patch,
            other_patch_sizes=self.others,
            masks_per_axis=self.k,
            patches=self.patches,
        )

    @property
    def images(self):
        """(images, pixels): row n holds the digits of n in base ``values``."""
        return np.array(list(product(range(self.values), repeat=self.image[0] * self.image[1])))

    def number(self, images):
        """The row of each image."""
        return images @ self.values ** np.arange(images.shape[1])[::-1]

    def attacks(self):
        """Every shape, place and content of the patch, or of two: (pixels, values)."""
        pixels = np.arange(self.image[0] * self.image[1]).reshape(self.image)
        (height, width), places = self.image, []
        for h, w in (self.patch, *self.others):
            for top, left in product(range(height - h + 1), range(width - w + 1)):
                places.append(pixels[top : top + h, left : left + w].ravel())
        for some in sorted(
            {
                tuple(np.unique(np.concatenate(one)))
                for one in combinations_with_replacement(places, self.patches)
            }
        ):
            for content in product(range(self.values), repeat=len(some)):
                yield list(some), content


WORLDS = [
    World((1, 5), (1, 1), 3, values=3, fill=3),
    World((1, 5), (1, 2), 2, values=3, fill=0),
    World((1, 5), (1, 3), 3, values=3, fill=3),
    World((2, 3), (1, 1), 2, values=2, fill=2),
    World((2, 3), (2, 1), 3, values=3, fill=3),
    World((2, 3), (1, 2), 2, values=3, fill=1),
    World((3, 3), (1, 1), 2, values=2, fill=2),
    World((3, 3), (1, 1), 3, values=2, fill=0),
    World((3, 3), (2, 2), 2, values=2, fill=2),
    World((3, 3), (1, 2), 2, values=2, fill=1),
]
SHAPES = [
    World((2, 3), (2, 1), 2, values=3, fill=3, others=((1, 2),)),
    World((2, 4), (2, 1), 2, values=2, fill=0, others=((1, 3),)),
    World((3, 3), (3, 1), 2, values=2, fill=1, others=((1, 2),)),
]
TWICE = [
    World((1, 6), (1, 2), 5, values=2, fill=0, patches=2),
    World((2, 3), (1, 1), 2, values=3, fill=0, patches=2),
    World((2, 4), (1, 1), 2, values=2, fill=2, patches=2),
    World((3, 3), (1, 1), 2, values=2, fill=0, patches=2),
    World((3, 3), (2, 1), 2, values=2, fill=0, others=((1, 2),), patches=2),
]


def random_classifier(world, seed):
    """A random look-up table of the pixels looked at: label 0 for most, so that certificates occur.

    Classifiers that look at all pixels are the most general; those that look at few are the easiest to
    attack, because every view that shows the patch is wrong in the same way.
    """
    rng = np.random.default_rng(seed)
    pixels = world.image[0] * world.image[1]
    looked_at = rng.choice(pixels, size=(pixels, 1, 1, 2)[seed % 4], replace=False)
    right = rng.choice([0.6, 0.8, 0.95])
    table = rng.choice(LABELS, p=[right, *[(1 - right) / 2] * 2], size=(world.values + 1) ** len(looked_at))
    return lambda views: table[views[:, looked_at] @ (world.values + 1) ** np.arange(len(looked_at))]


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


# --- Twins that must fail
# --------------------------------------------------------------------------------------------


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


def wary_classifier(world, hole):
    """Label 1 where a pixel of the hole has the value of an attacker: neither 0 nor the fill colour; else 0.
    It breaks wherever there is a hole."""
    pixels = np.arange(world.image[0] * world.image[1]).reshape(world.image)
    there = np.concatenate(
        [pixels[w.top : w.top + w.height, w.left : w.left + w.width].ravel() for w in hole]
    )
    clean = 0 if world.fill == world.values else world.fill
    return lambda views: (
        ((views[:, there] != clean) & (views[:, there] != world.fill)).any(axis=1).astype(int)
    )


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
