"""De-randomized Smoothing, Smoothed ViT and PatchGuard on bands pass the suite of every defense."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from torch import nn

from certipatch.data.load import load_source
from certipatch.defenses.evidence.defense import WindowDefense
from certipatch.defenses.evidence.rules import BoundedSum, RobustMasking, Rule
from certipatch.defenses.evidence.shown import ShownWindows
from certipatch.defenses.evidence.votes import BEST_VOTE, CONFIDENCE, Evidence, threshold_votes
from certipatch.geometry.masks import MaskSet
from certipatch.geometry.reach import Reach
from certipatch.verify.check import verify
from defenses.contract import DefenseContract, LookedUp
from tampering import forge, lines_of
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
    small: ClassVar = ("columns:2", "blocks:2/2")  # of one row of pixels, and of several
    worlds = SMALL
    evidence: ClassVar[Evidence]
    rule: ClassVar[Callable[[Reach], Rule]]

    def build(self, model: nn.Module, masks: MaskSet, fill: float) -> WindowDefense:
        return self.defense(model, masks, fill, type(self).rule)

    def defense(
        self, model: nn.Module, masks: MaskSet, fill: float, rule: Callable[[Reach], Rule]
    ) -> WindowDefense:
        height, width = masks.image_size
        windows = self.options["windows"] if width == 32 else self.small[height > 1]
        shown = ShownWindows(model, masks.image_size, windows, fill=fill)
        return WindowDefense(self.method, shown, self.evidence, rule, masks.threat)

    def twins(self, world: World, fill: float) -> Iterator[tuple[nn.Module, WindowDefense]]:
        for seed in range(40):
            model = LookedUp(world, random_classifier(world, seed)).eval()
            yield model, self.defense(model, world.masks, fill, one_less(type(self).rule))

    def test_verify_finds_a_tampered_slack(self, opened, photos, masks, tmp_path, monkeypatch):
        """What only another look at the image can tell: its slack, where it is least, and by how much."""
        out, source = self._certify(opened, photos, masks, tmp_path / "out"), load_source(str(photos))
        lines = lines_of(out)

        def findings(index: int, **changed: Any) -> list[str]:
            monkeypatch.setattr(
                "certipatch.verify.check.Asked.drawn",
                lambda _self, records, consistent, _source: {i: records[i] for i in consistent if i == index},
            )
            forge(out, [{**line, **(changed if line["index"] == index else {})} for line in lines])
            found = verify(out, model=opened, source=source, sample=None, device="cpu")
            return [str(one) for one in found.findings]

        assert findings(0) == []
        unit = 1 if self.evidence.sure else 2**20
        for line in (one_where(lines, certified=True), one_where(lines, certified=False)):
            index, slack = line["index"], line["slack"]
            further = unit if line["certified"] else -unit
            changed = {"slack": slack + further}
            if self.evidence.sure:
                changed["slack_published"] = line["slack_published"] + further
            assert any("slack is" in one for one in findings(index, **changed))
            if self.evidence.sure:
                assert any(
                    "slack_published" in one
                    for one in findings(index, slack_published=line["slack_published"] - 1)
                )
            if line["certified"]:
                assert any("margin" in one for one in findings(index, margin=line["margin"] + 1))
            other = 3 - line["rival"] - line["label"]
            top, left, height, width = line["weakest"][0]
            mirrored = [[32 - height - top, 32 - width - left, height, width]]
            found = findings(index, rival=other) + findings(index, weakest=mirrored)
            assert any("slack at" in one for one in found)
            for wrong in ({"weakest": [[0, 0, 6, 7]]}, {"weakest": None}, {"rival": line["label"]}):
                assert findings(index, **wrong)
        assert findings(0) == []

    def test_verify_finds_other_windows_than_were_used(self, opened, photos, masks, tmp_path):
        out = self._certify(opened, photos, masks, tmp_path / "out")
        lines, manifest = lines_of(out), json.loads((out / "manifest.json").read_text())
        assert verify(out).findings == []
        changes = {
            "windows": "columns:9",
            "rule": "prayer",
            "evidence": "tea leaves",
            "patch_size_known": None,
            "tokens": "burnt",
            "touched": {**manifest["experiment"]["touched"], "most": 1},
            "threat": {**manifest["experiment"]["threat"], "patch_size": [9, 9]},
        }
        for name, value in changes.items():
            changed = {**manifest, "experiment": {**manifest["experiment"], name: value}}
            forge(out, lines, changed)
            assert verify(out).findings, name
        forge(out, lines, manifest)
        assert verify(out).findings == []


def one_where(lines: list[dict[str, Any]], *, certified: bool) -> dict[str, Any]:
    return next(line for line in lines if line["certified"] is certified)


class TestDeRandomizedSmoothing(OfWindows):
    method = "ds"
    options: ClassVar = {"windows": "columns:8", "theta": 0.4}
    evidence = threshold_votes(0.4)
    rule = staticmethod(summed)


class TestTwoPatches(TestDeRandomizedSmoothing):
    options: ClassVar = {"windows": "columns:4", "theta": 0.4}
    small: ClassVar = ("columns:1", "blocks:1")
    worlds = (
        World((1, 6), (1, 1), 5, values=2, fill=2, patches=2),
        World((1, 7), (1, 1), 6, values=2, fill=0, patches=2),
    )
    geometry: ClassVar = {"patch_size": (2, 1), "patches": 2, "masks_per_axis": 1}


class TestSeveralShapes(TestDeRandomizedSmoothing):
    small: ClassVar = ("columns:1", "blocks:1")
    worlds = (
        World((2, 3), (2, 1), 2, values=3, fill=3, others=((1, 2),)),
        World((2, 4), (2, 1), 2, values=2, fill=0, others=((1, 3),)),
    )
    geometry: ClassVar = {"patch_size": (6, 3), "other_patch_sizes": [(3, 6)], "masks_per_axis": 1}


class TestSmoothedViT(OfWindows):
    method = "smoothed-vit"
    evidence = BEST_VOTE
    rule = staticmethod(summed)


class TestPatchGuard(OfWindows):
    method = "patchguard"
    evidence = CONFIDENCE
    rule = staticmethod(RobustMasking)
