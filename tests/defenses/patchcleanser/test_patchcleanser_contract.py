"""PatchCleanser passes the suite of every certified defense: both inferences, several shapes, two patches."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest

from certipatch import PatchCleanser
from defenses.contract import DefenseContract, LookedUp
from worlds import SHAPES, TWICE, random_classifier, wary_classifier


class TestDoubleMasking(DefenseContract):
    method = "patchcleanser"
    inference = "double-masking"

    def build(self, model, masks, fill):
        return PatchCleanser(model, masks, fill=fill, inference=self.inference)

    def twins(self, world, fill):
        """A mask less than is needed, and nobody who proves that they cover."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("certipatch.defenses.masked._check_masks", lambda _: None)
            for i in range(len(world.masks)):
                fewer = replace(
                    world.masks, windows=world.masks.windows[:i] + world.masks.windows[i + 1 :], grid=None
                )
                hole = fewer.uncovered_patches()
                classifiers = [wary_classifier(world, hole)] if hole else []
                classifiers += [random_classifier(world, seed) for seed in range(4)]
                for classify in classifiers:
                    model = LookedUp(world, classify).eval()
                    yield model, self.build(model, fewer, fill)


class TestChallengerMasking(TestDoubleMasking):
    inference = "challenger"
    options: ClassVar = {"inference": "challenger"}


class TestSeveralShapes(TestDoubleMasking):
    worlds = tuple(SHAPES[:2])
    geometry: ClassVar = {"patch_size": (6, 3), "other_patch_sizes": [(3, 6)], "masks_per_axis": 2}


class TestTwoPatches(TestDoubleMasking):
    worlds = tuple(TWICE[:2])
    geometry: ClassVar = {"patch_size": (1, 1), "patches": 2, "masks_per_axis": 2}
