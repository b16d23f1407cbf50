"""Worlds so tiny that every image, every place and every content of a patch can be tried.

A world is every image of a few pixels and values, and a classifier is a look-up table of masked images. An
attacked image is itself an image of the world.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import numpy as np

from certipatch.geometry.masks import MaskSet

LABELS = 3


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
