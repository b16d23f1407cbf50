"""De-randomized Smoothing, Smoothed ViT and PatchGuard on bands pass the suite of every defense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from torch import nn

from certipatch.defenses.evidence.defense import WindowDefense
from certipatch.defenses.evidence.rules import BoundedSum, RobustMasking, Rule
from certipatch.defenses.evidence.shown import ShownWindows
from certipatch.defenses.evidence.votes import BEST_VOTE, CONFIDENCE, Evidence, threshold_votes
from certipatch.geometry.masks import MaskSet
from certipatch.geometry.reach import Reach
from defenses.contract import DefenseContract, LookedUp
from worlds import World, random_classifier

SMALL = (
    World((1, 5), (1, 1), 3, values=3, fill=3),
    World((1, 6), (1, 2), 3, values=2, fill=2),
    World((3, 3), (1, 1), 2, values=2, fill=2),
)


def summed(reach: Reach) -> BoundedSum:
    return BoundedSum(reach, 1)


def one_less(rule: Callable[[Reach], Rule]) -> Callable[[Reach], Rule]:
    """The rule with a bound that reckons with one window less than a patch reaches."""

    def build(reach: Reach) -> Rule:
        touch = reach.touch.copy()
        for row in touch:
            row[np.flatnonzero(row)[0]] = False
        return rule(Reach(touch, reach.places))

    return build


class OfWindows(DefenseContract):
    """What these suites share: a defense around a model, and twins that reckon with too little."""

    options: ClassVar[dict[str, Any]] = {"windows": "columns:8"}
    worlds = SMALL
    evidence: ClassVar[Evidence]
    rule: ClassVar[Callable[[Reach], Rule]]

    def build(self, model: nn.Module, masks: MaskSet, fill: float) -> WindowDefense:
        return self.defense(model, masks, fill, type(self).rule)

    def defense(
        self, model: nn.Module, masks: MaskSet, fill: float, rule: Callable[[Reach], Rule]
    ) -> WindowDefense:
        small = max(masks.image_size) <= 6
        kind = "columns:2" if masks.image_size[0] == 1 else "blocks:2/2" if small else "columns:8"
        shown = ShownWindows(model, masks.image_size, kind, fill=fill)
        return WindowDefense(self.method, shown, self.evidence, rule, masks.threat)

    def twins(self, world: World, fill: float) -> Iterator[tuple[nn.Module, WindowDefense]]:
        for seed in range(40):
            model = LookedUp(world, random_classifier(world, seed)).eval()
            yield model, self.defense(model, world.masks, fill, one_less(type(self).rule))


class TestDeRandomizedSmoothing(OfWindows):
    method = "ds"
    options: ClassVar = {"windows": "columns:8", "theta": 0.4}
    evidence = threshold_votes(0.4)
    rule = staticmethod(summed)


class TestSmoothedViT(OfWindows):
    method = "smoothed-vit"
    evidence = BEST_VOTE
    rule = staticmethod(summed)


class TestPatchGuard(OfWindows):
    method = "patchguard"
    evidence = CONFIDENCE
    rule = staticmethod(RobustMasking)

    def masks_one_less(self, reach: Reach) -> Rule:
        return replace(RobustMasking(reach), reach=reach)
