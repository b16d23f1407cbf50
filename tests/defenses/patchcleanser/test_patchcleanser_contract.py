"""PatchCleanser passes the suite of every certified defense: both inferences, several shapes, two patches."""

from __future__ import annotations

from typing import ClassVar

from certipatch import PatchCleanser
from defenses.contract import DefenseContract, with_a_mask_less
from worlds import SHAPES, TWICE


class TestDoubleMasking(DefenseContract):
    method = "patchcleanser"
    inference = "double-masking"

    def build(self, model, masks, fill):
        return PatchCleanser(model, masks, fill=fill, inference=self.inference)

    def twins(self, world, fill):
        return with_a_mask_less(self.build, world, fill)


class TestChallengerMasking(TestDoubleMasking):
    inference = "challenger"
    options: ClassVar = {"inference": "challenger"}


class TestSeveralShapes(TestDoubleMasking):
    worlds = tuple(SHAPES[:2])
    geometry: ClassVar = {"patch_size": (6, 3), "other_patch_sizes": [(3, 6)], "masks_per_axis": 2}


class TestTwoPatches(TestDoubleMasking):
    worlds = tuple(TWICE[:2])
    geometry: ClassVar = {"patch_size": (1, 1), "patches": 2, "masks_per_axis": 2}
