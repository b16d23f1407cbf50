"""Minority Reports passes the suite of every certified defense: a wrong answer comes with an alarm."""

from __future__ import annotations

from dataclasses import replace

import pytest

from certipatch import MinorityReports
from defenses.contract import DefenseContract, LookedUp
from worlds import random_classifier, wary_classifier


class TestMinorityReports(DefenseContract):
    method = "minority-reports"

    def build(self, model, masks, fill):
        return MinorityReports(model, masks, threshold=0.4, fill=fill)

    def keeps(self, verdict, label):
        return verdict.alarm or verdict.defended_label == label

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
