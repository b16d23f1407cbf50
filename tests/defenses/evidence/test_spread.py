"""A rule reckons with the spread that the evidence has, and not with what a clean image shows of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from certipatch.defenses.evidence import defense as of_defense
from certipatch.defenses.evidence.defense import WindowDefense
from certipatch.defenses.evidence.rules import BoundedSum
from certipatch.defenses.evidence.shown import ShownWindows
from certipatch.defenses.evidence.votes import BEST_VOTE, LOGIT, POSITIVE
from certipatch.errors import SoundnessError
from certipatch.geometry.patch import Threat

pytestmark = pytest.mark.usefixtures("one_thread")


class Steep(nn.Module):
    """Class 0 by what is dark, and class 1 by what is white, which counts for far more."""

    def forward(self, images: Tensor) -> Tensor:
        dark, white = (images < 0.4).float(), (images > 0.9).float()
        return torch.stack([dark.mean((1, 2, 3)), 500 * white.mean((1, 2, 3))], dim=1)


def made(evidence, spread: int) -> WindowDefense:
    windows = ShownWindows(Steep().eval(), (8, 8), "columns:2", fill=0.5)
    return WindowDefense("any", windows, evidence, partial(BoundedSum, spread=spread), Threat((2, 2)))


def test_a_rule_for_a_smaller_spread_than_that_of_the_evidence_is_refused():
    with pytest.raises(SoundnessError, match="rule bounded-sum: expected a spread of at least positive's"):
        made(POSITIVE, LOGIT)
    with pytest.raises(SoundnessError, match="expected a spread of at least best-vote's, 1, found 0"):
        made(BEST_VOTE, 0)
    assert made(BEST_VOTE, 1).certify(torch.zeros(1, 3, 8, 8), torch.tensor([0]))[0].certified


def test_the_twin_that_believes_the_clean_image_breaks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(of_defense, "_check_spread", lambda _evidence, _rule: None)
    defense, image = made(POSITIVE, LOGIT // 4), torch.zeros(1, 3, 8, 8)
    assert defense.certify(image, torch.tensor([0]))[0].certified
    image[:, :, 3:5, 3:5] = 1
    assert defense.predict(image).tolist() == [1]
