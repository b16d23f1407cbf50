"""The margin of a certificate by windows, rounding, and what the defense refuses."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import timm
import torch
from torch import nn

from certipatch.certification.methods import METHODS, Way
from certipatch.defenses.evidence.defense import WindowDefense
from certipatch.defenses.evidence.rules import BoundedSum, RobustMasking, TwoMasks
from certipatch.defenses.evidence.shown import ShownWindows
from certipatch.defenses.evidence.votes import BEST_VOTE, CONFIDENCE, STEP, Evidence, threshold_votes
from certipatch.defenses.patchcleanser.algorithms import answer, two_mask_correct
from certipatch.errors import ConfigError, SoundnessError
from certipatch.geometry.masks import MaskSet
from certipatch.geometry.patch import Threat
from certipatch.geometry.reach import touched
from certipatch.geometry.sights import sights_of

pytestmark = pytest.mark.usefixtures("one_thread")

REACH = touched(sights_of("columns:2", (1, 9)), (1, 9), Threat((1, 1)))


class Stated:
    """A source whose windows say what the test states: (N, windows, classes)."""

    precision, passes, least_margin, classes, image_size = "32-true", 10, 0.0, 3, (1, 9)
    model, sights = nn.Identity(), sights_of("columns:2", (1, 9))

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def check(self):
        pass

    def look(self, images):
        return self.logits, self.logits.mean(1).argmax(1)


def verdicts(logits: np.ndarray, evidence: Evidence, rule, labels: list[int]):
    """The verdicts on images whose windows say this."""
    defense = WindowDefense("stated", Stated(torch.as_tensor(logits)), evidence, rule, Threat((1, 1)))
    return defense.examine(torch.zeros(len(logits), 3, 1, 9), torch.tensor(labels))


def summed(reach):
    return BoundedSum(reach, 1)


def certain_logits(seed: int, n: int = 60) -> np.ndarray:
    """Windows that mostly say class 1, some of them nearly another one."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 9, 3))
    logits[..., 1] += rng.choice([0.5, 2, 4], size=(n, 1))
    return logits.astype(np.float32)


@pytest.mark.parametrize("evidence", [threshold_votes(0.4), BEST_VOTE, STEP], ids=lambda one: one.name)
class TestMarginOfVotes:
    def test_within_it_nothing_is_lost_and_beyond_it_something_can_be(self, evidence):
        """Every logit moves as an enemy of the certificate wants: a little less, and several times more."""
        logits, lost, certified = certain_logits(0), 0, 0
        for image, verdict in zip(logits, verdicts(logits, evidence, summed, [1] * len(logits)), strict=True):
            if not verdict.certified:
                assert verdict.margin is None
                continue
            certified += 1
            for factor in (0.99, 4):
                step = factor * verdict.margin * (1 if evidence is STEP else 0.5)
                worse = [image.astype(np.float64) for _ in (0, 2)]
                for moved, rival in zip(worse, (0, 2), strict=True):
                    moved[:, 1] -= step
                    moved[:, rival] += step
                again = verdicts(np.array(worse), evidence, summed, [1, 1])
                if factor < 1:
                    assert all(one.certified for one in again)
                else:
                    lost += not all(one.certified for one in again)
        assert certified > 10
        assert lost > 0

    def test_it_is_how_near_the_first_window_is_that_counts(self, evidence):
        """Against trying how many of the least sure windows may say anything at all."""
        logits = certain_logits(1)
        for image, verdict in zip(logits, verdicts(logits, evidence, summed, [1] * len(logits)), strict=True):
            if verdict.certified:
                integers, sure = evidence.of(image), evidence.sure(image)
                order = np.argsort(sure, kind="stable")
                held = 0
                while anything_holds(integers, order[: held + 1]):
                    held += 1
                assert verdict.margin == pytest.approx(sure[order[held]])


def anything_holds(integers: np.ndarray, free: np.ndarray) -> bool:
    """Whether class 1 stays certified if the free windows say the worst for it."""
    worst = []
    for rival in (0, 2):
        changed = integers.copy()
        changed[free] = np.eye(3, dtype=np.int64)[rival]
        worst.append(BoundedSum(REACH, 1).slack(changed, 1).slack)
    return min(worst) >= 0


@pytest.mark.parametrize(
    "rule", [RobustMasking, lambda reach: TwoMasks(reach, lambda table: answer(table, "challenger")[0])]
)
def test_margin_of_confidences(rule):
    """What moves with the logits keeps its certificate within the margin."""
    logits = certain_logits(2) * 3
    found, rng = verdicts(logits, CONFIDENCE, rule, [1] * len(logits)), np.random.default_rng(0)
    certified = [(image, one) for image, one in zip(logits, found, strict=True) if one.certified]
    assert len(certified) > 10
    assert max(one.margin for _, one in certified) > 0.01
    for image, verdict in certified:
        for _ in range(5):
            moved = image + (rng.choice([-0.5, 0.5], size=image.shape) * verdict.margin).astype(np.float32)
            assert verdicts(moved[None], CONFIDENCE, rule, [1])[0].certified


def test_two_masks_are_certified_as_patchcleanser_certifies():
    """The slack of rule C says what Algorithm 2 says of its table."""
    from certipatch.defenses.evidence.two_masks import two_mask_table

    rule = TwoMasks(REACH, lambda table: answer(table, "double-masking")[0])
    seen = set()
    for image in certain_logits(3):
        evidence = CONFIDENCE.of(image)
        table = two_mask_table(evidence, REACH.touch, REACH.touch)
        for label in range(3):
            assert (rule.slack(evidence, label).slack >= 0) == two_mask_correct(table, label)
        seen.add(two_mask_correct(table, 1))
    assert seen == {True, False}


def test_slack_is_per_place_and_the_weakest_place_is_named():
    """The slack at the place that is named, against the rival that is named, is the slack."""
    logits = certain_logits(4)
    for image, verdict in zip(logits, verdicts(logits, BEST_VOTE, summed, [1] * len(logits)), strict=True):
        evidence = BEST_VOTE.of(image)
        ((_, left, _, _),) = verdict.weakest
        reached = {left, (left - 1) % 9}
        outside = [w for w in range(9) if w not in reached]
        lead = evidence[outside, 1].sum() - evidence[outside, verdict.rival].sum()
        assert verdict.slack == lead - len(reached) - (verdict.rival < 1)
        assert verdict.slack_published <= verdict.slack


def test_an_answer_that_is_proven_is_that_of_every_image_that_differs_by_a_patch():
    """Without a label: exhaustively over what an attacker may write into what a patch reaches."""
    logits = certain_logits(5, n=12)
    defense = WindowDefense("stated", Stated(torch.as_tensor(logits)), BEST_VOTE, summed, Threat((1, 1)))
    proven = [
        (i, one) for i, one in enumerate(defense.examine_proven(torch.zeros(12, 3, 1, 9))) if one.certified
    ]
    assert 0 < len(proven) < 12
    for i, one in proven:
        evidence = BEST_VOTE.of(logits[i])
        for row in REACH.touch:
            for written in product(np.eye(3, dtype=np.int64), repeat=int(row.sum())):
                changed = evidence.copy()
                changed[row] = written
                assert BoundedSum(REACH, 1).label(changed) == one.defended_label


class TestRefusals:
    masks = MaskSet.covering(image_size=(32, 32), patch_size=(5, 5), masks_per_axis=1)

    @staticmethod
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, 3)).eval()

    @pytest.mark.parametrize(
        ("defense", "options", "words"),
        [
            ("ds", {"windows": "columns:4", "theta": 1.5}, "theta 1.5: expected a confidence from 0 to 1"),
            ("ds", {"windows": "columns:4", "theta": float("nan")}, "theta nan"),
            ("ds", {"windows": "columns:33"}, "expected 1 to 32 pixels"),
            ("ds", {"windows": "columns:4/8"}, "leave pixels that no window shows"),
            ("ds", {"windows": "cells:17/8"}, "cells are for clipped-bagnet"),
            ("smoothed-vit", {"windows": "columns:4", "tokens": "burnt"}, "expected dropped or filled"),
        ],
    )
    def test_options(self, defense, options, words):
        with pytest.raises(ConfigError, match=words):
            METHODS[defense].build(self.network(), self.masks, Way(), **options)

    @pytest.mark.parametrize("arch", ["eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"])
    def test_smoothed_vit_drops_no_tokens_that_are_turned_or_windowed(self, arch):
        """By default; asked to fill, it takes them as any network."""
        model = timm.create_model(arch, num_classes=3).eval()
        masks = MaskSet.covering(image_size=(224, 224), patch_size=(32, 32), masks_per_axis=1)
        with pytest.raises(SoundnessError, match="take --tokens filled"):
            METHODS["smoothed-vit"].build(model, masks, Way(), windows="columns:112/56")
        filled = METHODS["smoothed-vit"].build(model, masks, Way(), windows="columns:112/56", tokens="filled")
        assert filled.describe()["tokens"] == "filled"

    @pytest.mark.parametrize(("arch", "tokens"), [("test_vit", "dropped"), ("test_resnet", "filled")])
    def test_smoothed_vit_drops_tokens_where_there_are_some(self, arch, tokens):
        model = timm.create_model(arch, num_classes=3).eval()
        masks = MaskSet.covering(image_size=(160, 160), patch_size=(32, 32), masks_per_axis=1)
        defense = METHODS["smoothed-vit"].build(
            model, masks, Way(compile=tokens == "dropped"), windows="columns:20/10"
        )
        assert defense.describe()["tokens"] == tokens
        assert defense.describe_network()["compiled"] is False  # compiled code is for one number of tokens

    def test_a_model_in_training_mode(self):
        with pytest.raises(SoundnessError, match="evaluation mode"):
            METHODS["ds"].build(self.network().train(), self.masks, Way(), windows="columns:4")

    def test_logits_that_are_not_finite(self):
        class Wild(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = TestRefusals.network()

            def forward(self, images):
                logits = self.inner(images)
                return torch.where(images.amax((1, 2, 3), keepdim=True)[:, :, 0, 0] > 0.99, torch.nan, logits)

        source = ShownWindows(Wild().eval(), (32, 32), "columns:4", fill=0.5)
        images = torch.full((1, 3, 32, 32), 0.25)
        assert source.look(images)[0].isfinite().all()
        images[0, 0, 0, 0] = 1.0
        with pytest.raises(SoundnessError, match="NaN"):
            source.look(images)

    def test_no_images(self):
        defense = METHODS["ds"].build(self.network(), self.masks, Way(), windows="columns:4")
        assert defense.examine(torch.zeros(0, 3, 32, 32)) == []


def test_what_the_windows_said_is_remembered_only_where_it_is_asked_for():
    """A model that changes between two looks is looked at again."""
    network = TestRefusals.network()
    source, images = ShownWindows(network, (32, 32), "columns:8"), torch.rand(2, 3, 32, 32)
    before = source.look(images)[0]
    with source.remembering():
        once = source.look(images)[0]
        assert source.look(images.clone())[0] is once
        other = source.look(1 - images)[0]
        assert not torch.equal(other, once)
        written = torch.rand(2, 3, 32, 32)
        of_before = source.look(written)[0]
        written[:] = 0
        assert not torch.equal(source.look(written)[0], of_before)
    with torch.no_grad():
        network[0].weight += 1
    assert torch.equal(before, once)
    assert not torch.equal(source.look(images)[0], before)


def test_a_stride_that_does_not_divide_the_image_is_reckoned_with_as_it_is():
    """The smallest world in which the published count of windows is one too low: 5 pixels, bands of 2 at
    every second, a patch of 1. The formula says 1; the bands are {0, 1}, {2, 3} and {4, 0}."""

    class Votes(nn.Module):
        """Class 1 if some pixel that is shown (not of the fill colour) is above 0.9, else class 0."""

        def forward(self, images):
            loud = ((images > 0.9) & (images < 1)).flatten(1).any(1)
            return nn.functional.one_hot(loud.long(), 2).float() * 4

    shown = ShownWindows(Votes().eval(), (1, 5), "columns:2/2", fill=1.0)
    defense = WindowDefense("ds", shown, BEST_VOTE, summed, Threat((1, 1)))
    assert defense.describe()["touched"] == {"windows": 3, "sets": 2, "most": 2}
    image = torch.full((1, 3, 1, 5), 0.5)
    (verdict,) = defense.certify(image, torch.tensor([0]))
    assert (verdict.defended_label, verdict.certified) == (0, False)
    image[..., 0] = 0.95
    assert defense.predict(image).tolist() == [1], "a patch on pixel 0 turns two votes of three"
    by_formula = BoundedSum(defense.reach._replace(touch=np.array([[True, False, False]])), 1)
    assert by_formula.slack(np.array([[1, 0]] * 3), 0).slack >= 0, "the twin certifies it"


def test_sets_that_a_patch_reaches_do_not_depend_on_the_height_of_a_patch_on_columns():
    """Column bands certify every height: that is said in the docs."""
    sights = sights_of("columns:4", (32, 32))
    one, tall = (touched(sights, (32, 32), Threat((h, 5))).touch for h in (1, 32))
    assert np.array_equal(one, tall)
    assert all(len(set(pair)) == 2 for pair in combinations(map(bytes, one), 2))
