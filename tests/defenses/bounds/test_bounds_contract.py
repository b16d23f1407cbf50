"""Interval bounds pass the suite of every defense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from certipatch.data.load import load_source
from certipatch.defenses.bounds.defense import IntervalDefense
from certipatch.geometry.masks import MaskSet
from certipatch.models.build import build, describe
from certipatch.models.runs import Opened, open_run
from certipatch.runtime.devices import make_fabric
from certipatch.training.config import TrainConfig
from certipatch.training.train import train
from defenses.contract import DefenseContract
from worlds import World


@pytest.fixture(scope="session")
def ibp_run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A training run of ibp-small on ``photos`` with the loss of interval bounds."""
    source = load_source(str(photos))
    spec = describe("ibp-small", classes=source.classes, num_classes=3)
    config = TrainConfig(
        strategy="vanilla",
        patch_size=(4, 4),
        masks_per_axis=6,
        epochs=25,
        batch_size=8,
        lr=0.02,
        loss="interval",
    )
    out = tmp_path_factory.mktemp("runs") / "ibp"
    train(build(spec), spec, source, source, config, out, fabric=make_fabric(device="cpu"))
    return out


class TestIntervalBounds(DefenseContract):
    method = "ibp"
    geometry: ClassVar = {"patch_size": (2, 2), "masks_per_axis": 8}
    worlds: ClassVar = (
        World((2, 3), (1, 1), 3, values=3, fill=0),  # masks of one pixel
    )

    @pytest.fixture
    def opened(self, ibp_run: Path) -> Opened:
        return open_run(ibp_run)

    def model(self, world: World, seed: int) -> nn.Module:
        """Two layers that answer 1 mostly."""
        torch.manual_seed(seed)
        height, width = world.image
        linear = nn.Linear(4 * (height - 1) * (width - 1), 3)
        with torch.no_grad():
            linear.weight.mul_(2)
            linear.bias.copy_(torch.tensor([0.0, 1.1, 0.0]))
        return nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), linear).eval()

    def build(self, model: nn.Module, masks: MaskSet, fill: float) -> IntervalDefense:
        return IntervalDefense(model, masks)

    def twins(self, world: World, fill: float) -> Iterator[tuple[nn.Module, IntervalDefense]]:
        """A mask less than is needed, and nobody who proves that they cover."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MaskSet, "uncovered_patches", lambda _: None)
            for i, (hidden,) in enumerate(world.masks.windows):
                windows = world.masks.windows[:i] + world.masks.windows[i + 1 :]
                model = self.wary(world, hidden.top * world.image[1] + hidden.left)
                yield model, IntervalDefense(model, replace(world.masks, windows=windows, grid=None))

    def wary(self, world: World, pixel: int) -> nn.Module:
        """A network that answers 1, but 0 where one pixel is not black."""
        linear = nn.Linear(3 * world.image[0] * world.image[1], 3)
        with torch.no_grad():
            linear.weight.zero_()
            linear.weight[0, pixel] = 10
            linear.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
        return nn.Sequential(nn.Flatten(), linear).eval()
