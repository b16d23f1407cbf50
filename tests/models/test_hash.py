"""The hash of weights is of everything that an answer depends on: each parameter and each buffer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from certipatch.models.weights import weights_sha256


def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    made[1].running_mean.normal_()
    return made


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "weight": lambda m: m[0].weight.data.view(-1)[:1].add_(1),
    "bias": lambda m: m[3].bias.data.add_(1e-6),
    "running mean": lambda m: m[1].running_mean.add_(1),
    "running variance": lambda m: m[1].running_var.mul_(2),
    "batches counted": lambda m: m[1].num_batches_tracked.add_(1),
    "permutation": lambda m: m[0].weight.data.copy_(m[0].weight.data.flip(0)),
    "shape": lambda m: setattr(m[3], "weight", nn.Parameter(m[3].weight.data.view(1, 8))),
    "type": lambda m: m[0].half(),
}


def test_equal_weights_have_equal_hashes():
    one = model()
    assert weights_sha256(one) == weights_sha256(copy.deepcopy(one)) == weights_sha256(model())


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_changes_the_hash(name: str):
    one = model()
    before = weights_sha256(one)
    CHANGES[name](one)
    assert weights_sha256(one) != before
