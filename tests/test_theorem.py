"""The theorem by exhaustion: on tiny worlds no patch, of any content and at any place, changes a certified answer.

A world is every image of a few pixels and values, and a classifier is a random look-up table of masked images. An
attacked image is itself an image of the world, so every image is defended once, and an attack is a look-up.
The masks and both algorithms are the library's; the patches are tried here, one by one.

The twins must fail: with one mask taken away, for a patch larger than the masks were made for, or with a certificate
from fewer views, attacks succeed.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest

import oracle
from certipatch.masks import MaskSet
from certipatch.patchcleanser import double_masking, two_mask_correct

LABELS = 3
SEEDS = 12  # classifiers in each world


@dataclass(frozen=True)
class World:
    """All images of ``image`` pixels with values 0 .. values-1; masked pixels have the value ``fill``."""

    image: tuple[int, int]
    patch: tuple[int, int]
    k: int
    values: int
    fill: int  # one of the values, or ``values`` itself: a colour that no pixel has

    def __str__(self):
        (height, width), (h, w) = self.image, self.patch
        return f"{height}x{width}-patch-{h}x{w}-k{self.k}-values-{self.values}-fill-{self.fill}"

    @property
    def masks(self):
        return MaskSet.covering(image_size=self.image, patch_size=self.patch, masks_per_axis=self.k)

    @property
    def images(self):
        """(images, pixels): row n holds the digits of n in base ``values``."""
        return np.array(list(product(range(self.values), repeat=self.image[0] * self.image[1])))

    def number(self, images):
        """The row of each image."""
        return images @ self.values ** np.arange(images.shape[1])[::-1]

    def attacks(self):
        """Every place and content of the patch: (pixels, values)."""
        pixels = np.arange(self.image[0] * self.image[1]).reshape(self.image)
        (height, width), (h, w) = self.image, self.patch
        for top, left in product(range(height - h + 1), range(width - w + 1)):
            for content in product(range(self.values), repeat=h * w):
                yield pixels[top : top + h, left : left + w].ravel(), content


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


def random_classifier(world, seed):
    """A random look-up table of the pixels looked at: label 0 for most, so that certificates occur.

    Classifiers that look at all pixels are the most general; those that look at few are the easiest to attack,
    because every view that shows the patch is wrong in the same way.
    """
    rng = np.random.default_rng(seed)
    pixels = world.image[0] * world.image[1]
    looked_at = rng.choice(pixels, size=(pixels, 1, 1, 2)[seed % 4], replace=False)
    right = rng.choice([0.6, 0.8, 0.95])
    table = rng.choice(LABELS, p=[right, *[(1 - right) / 2] * 2], size=(world.values + 1) ** len(looked_at))
    return lambda views: table[views[:, looked_at] @ (world.values + 1) ** np.arange(len(looked_at))]


def exhaust(world, masks, classify, certify=two_mask_correct):
    """Attack every image in every way and count.

    Returns the numbers of certified images; of attacks on them, by the case of Algorithm 1 that answered; of attacks
    on them that changed the answer (broken); and of attacks on the other images that did.
    """
    images = world.images
    keeps = [oracle.keep_of(world.image, [(w.top, w.left, w.height, w.width) for w in mask]).ravel() for mask in masks.windows]
    tables = np.empty((len(images), len(masks), len(masks)), dtype=np.int64)
    for (i, a), (j, b) in product(enumerate(keeps), repeat=2):
        tables[:, i, j] = classify(np.where(a & b, images, world.fill))

    answers, cases = zip(*(double_masking(t.diagonal().tolist(), lambda i, t=t: t[i].tolist()) for t in tables), strict=True)
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


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_no_attack_on_a_certified_image_succeeds(world):
    """The theorem; and what makes the test worth its name: all three cases answer, and uncertified images do break."""
    counts = Counter()
    for seed in range(SEEDS):
        counts.update(exhaust(world, world.masks, random_classifier(world, seed)))
    assert counts["broken"] == 0
    assert counts["certified"] >= 300
    assert min(counts["agreed"], counts["disagreer"], counts["majority"]) >= 20
    assert counts["others broken"] >= 50


# --- Twins that must fail --------------------------------------------------------------------------------------------


def some_attack_succeeds(world, masks, **options):
    """Is any certified image broken, by any attack, for any of many classifiers?"""
    return any(exhaust(world, masks, random_classifier(world, seed), **options)["broken"] for seed in range(60))


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_twin_with_a_mask_less(world):
    """Every mask is needed: whichever is dropped, some patch is covered by no mask, and some certificate is false."""
    masks = world.masks
    for i in range(len(masks)):
        fewer = replace(masks, windows=masks.windows[:i] + masks.windows[i + 1 :], grid=None)
        assert fewer.uncovered_patch(world.patch) is not None
        assert some_attack_succeeds(world, fewer), f"without mask {i}"


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_twin_with_a_larger_patch(world):
    """Masks made for one patch promise nothing about a wider one that they do not cover."""
    masks, (height, width) = world.masks, world.patch
    wider = next((height, w) for w in range(width + 1, world.image[1] + 1) if masks.uncovered_patch((height, w)))
    assert some_attack_succeeds(replace(world, patch=wider), masks)


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_twin_with_one_mask_views_only(world):
    """The certificate needs the two-mask views: one-mask views that are all right do not suffice."""
    assert some_attack_succeeds(world, world.masks, certify=lambda table, label: bool((table.diagonal() == label).all()))
