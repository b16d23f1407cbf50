"""Clipped BagNet, BagCert, PatchGuard on cells and rule C pass the suite of every defense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certipatch.data.load import load_source
from certipatch.defenses.evidence.cells import CellWindows
from certipatch.defenses.evidence.defense import WindowDefense
from certipatch.defenses.evidence.rules import BoundedSum, RobustMasking, Rule, TwoMasks
from certipatch.defenses.evidence.votes import CLIPPED_TANH, POSITIVE, SIGNED, STEP, TANH, Evidence
from certipatch.defenses.patchcleanser.algorithms import answer
from certipatch.errors import ConfigError, SoundnessError
from certipatch.geometry.masks import MaskSet
from certipatch.geometry.patch import Threat
from certipatch.geometry.reach import Reach
from certipatch.models.bagnet import Local
from certipatch.models.build import build, describe
from certipatch.models.runs import Opened, open_run
from certipatch.runtime.devices import make_fabric
from certipatch.training.config import TrainConfig
from certipatch.training.train import train
from defenses.contract import DefenseContract
from worlds import LABELS, World


class TinyCells(Local):
    """A random network of a world's images whose cells see ``field`` x ``field`` pixels each."""

    def __init__(self, field: int, seed: int) -> None:
        super().__init__()
        self.field = self.stride = field
        torch.manual_seed(seed)
        self.first, self.fc = nn.Conv2d(3, 8, field, field), nn.Linear(8, LABELS)
        with torch.no_grad():
            self.first.weight.mul_(4)
            self.fc.weight.mul_(6)
            self.fc.bias.copy_(torch.tensor([-0.5, 1.5, -0.5]))  # for certificates

    def cells(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.first(images).relu().flatten(2).transpose(1, 2))
        return logits


WORLDS = (
    World((1, 6), (1, 1), 3, values=3, fill=0),
    World((2, 4), (1, 1), 3, values=2, fill=0),  # two cells of 2x2
    World((3, 3), (1, 2), 2, values=2, fill=0),
)


@pytest.fixture(scope="session")
def bagnet_run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A training run of a small BagNet on ``photos``."""
    source = load_source(str(photos))
    spec = describe("small-bagnet-9", classes=source.classes, num_classes=3)
    config = TrainConfig(
        strategy="vanilla", patch_size=(3, 3), masks_per_axis=6, epochs=6, batch_size=8, lr=0.1
    )
    out = tmp_path_factory.mktemp("runs") / "bagnet"
    train(build(spec), spec, source, source, config, out, fabric=make_fabric(device="cpu"))
    return out


class OfCells(DefenseContract):
    """What these suites share: the cells of a network, and twins that reckon with too little."""

    options: ClassVar[dict[str, Any]] = {"windows": "cells:9/2"}
    geometry: ClassVar = {"patch_size": (3, 3), "masks_per_axis": 2}
    worlds = WORLDS
    evidence: ClassVar[Evidence]
    rule: ClassVar[Callable[[Reach], Rule]]
    narrow: ClassVar[Callable[[Reach], Rule]]  # the rule with a part of the proof taken away

    @pytest.fixture
    def opened(self, bagnet_run: Path) -> Opened:
        return open_run(bagnet_run)

    def model(self, world: World, seed: int) -> nn.Module:
        field = 2 if world.image == (2, 4) else 1
        return nn.Sequential(nn.Identity(), TinyCells(field, seed)).eval()

    def build(self, model: nn.Module, masks: MaskSet, fill: float) -> WindowDefense:
        return self.defense(model, masks, type(self).rule)

    def defense(self, model: nn.Module, masks: MaskSet, rule: Callable[[Reach], Rule]) -> WindowDefense:
        network: Any = list(model.children())[-1]
        cells = CellWindows(model, masks.image_size, f"cells:{network.field}/{network.stride}")
        return WindowDefense(self.method, cells, self.evidence, rule, masks.threat)

    def twins(self, world: World, fill: float) -> Iterator[tuple[nn.Module, WindowDefense]]:
        for seed in range(60):
            model = self.model(world, seed)
            yield model, self.defense(model, world.masks, type(self).narrow)


def one_less(rule: Callable[[Reach], Rule], reach: Reach) -> Rule:
    """The rule with a bound that reckons with one window less than a patch reaches."""
    touch = reach.touch.copy()
    for row in touch:
        row[np.flatnonzero(row)[0]] = False
    return rule(Reach(touch, reach.places))


def two_masks(reach: Reach) -> TwoMasks:
    return TwoMasks(reach, lambda table: answer(table, "double-masking")[0])


class TestClippedBagNet(OfCells):
    method = "clipped-bagnet"
    evidence = CLIPPED_TANH
    rule = staticmethod(partial(BoundedSum, spread=2 * TANH))
    narrow = staticmethod(partial(one_less, partial(BoundedSum, spread=2 * TANH)))

    @pytest.fixture
    def opened(self, bagnet_run: Path) -> Opened:
        """With logits of the size that the clip leaves apart, which a longer training gives too."""
        run = open_run(bagnet_run)
        with torch.no_grad():
            run.network[1].fc.weight.mul_(20)  # type: ignore[union-attr, operator]
            run.network[1].fc.bias.mul_(20)  # type: ignore[union-attr, operator]
        return Opened.of(run.spec, run.network, run.trained)

    def model(self, world: World, seed: int) -> nn.Module:
        """With logits of the size that the clip leaves apart."""
        model = super().model(world, seed)
        with torch.no_grad():
            model[1].fc.weight.mul_(30)  # type: ignore[index]
            model[1].fc.bias.mul_(30)  # type: ignore[index]
        return model


class TestBagCert(OfCells):
    method = "bagcert"
    evidence = STEP
    rule = staticmethod(partial(BoundedSum, spread=1))
    narrow = staticmethod(partial(one_less, partial(BoundedSum, spread=1)))


class TestPatchGuardOnCells(OfCells):
    method = "patchguard"
    evidence = POSITIVE
    rule = staticmethod(RobustMasking)
    narrow = staticmethod(partial(one_less, RobustMasking))


class TestTwoMasks(OfCells):
    method = "patchcure-srf"
    evidence = SIGNED
    rule = staticmethod(two_masks)
    narrow = staticmethod(partial(one_less, two_masks))


def test_windows_that_are_not_the_networks_are_refused() -> None:
    model = build(describe("small-bagnet", classes=(), num_classes=3))
    with pytest.raises(ConfigError, match=r"windows cells:9/2: expected those of the network, cells:5/1"):
        CellWindows(model, (32, 32), "cells:9/2")
    other = build(describe("small-cnn", classes=(), num_classes=3))
    with pytest.raises(ConfigError, match="expected a network with cells"):
        CellWindows(other, (32, 32), "cells:9/2")


def test_a_network_that_is_changed_is_measured_again() -> None:
    model = build(describe("small-bagnet", classes=(), num_classes=3, image_size=(14, 14)))
    windows = CellWindows(model, (14, 14), "cells:5/1")
    windows.check()
    model[1].features[0].padding = (2, 2)  # type: ignore[union-attr, index]
    with pytest.raises(SoundnessError, match="cells: expected"):
        windows.check()


def test_evidence_that_is_no_number_is_refused() -> None:
    model = build(describe("small-bagnet", classes=(), num_classes=3, image_size=(14, 14)))
    defense = WindowDefense(
        "bagcert",
        CellWindows(model, (14, 14), "cells:5/1"),
        STEP,
        partial(BoundedSum, spread=1),
        Threat((2, 2)),
    )
    with torch.no_grad():
        model[1].fc.bias[0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(SoundnessError):
        defense.predict(torch.zeros(1, 3, 14, 14))


def test_a_network_that_works_in_place_leaves_the_images_as_they_are() -> None:
    class Shifted(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.sub_(0.5)

    spec = describe("small-bagnet", classes=("a", "b", "c"), num_classes=3, image_size=(16, 16))
    cells = CellWindows(nn.Sequential(Shifted(), build(spec)[1]).eval(), (16, 16), "cells:5/1")
    images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    cells.look(images)
    assert torch.equal(images, before)
