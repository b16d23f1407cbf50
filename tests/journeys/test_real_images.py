"""Labels, certificates and tables on real images equal the naive restatement of the papers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import certipatch as cp
import oracle
from certipatch.data.load import load_source
from certipatch.data.source import Images, as_float
from certipatch.models.build import build, describe
from certipatch.models.small import SMALL_CNN
from certipatch.models.weights import LITE0_PACKAGE
from certipatch.runtime.devices import make_fabric
from certipatch.training.config import TrainConfig
from certipatch.training.train import train as fine_tune
from inputs import SHARED


def naive_table(
    model: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, windows: list, fill: torch.Tensor
) -> np.ndarray:
    """F(x.m_i.m_j) for every pair, one forward pass each, masks painted one after the other."""

    def label(*pair: tuple[int, int, int, int]) -> int:
        view = image.clone()
        for top, left, height, width in pair:
            view[:, top : top + height, left : left + width] = fill.view(3, 1, 1)
        with torch.no_grad():
            return int(model(view[None]).argmax())

    return np.array([[label(a, b) for b in windows] for a in windows])


def check(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, masks: cp.MaskSet
) -> list[cp.Verdict]:
    defense = cp.PatchCleanser(model, masks, batch_size=50)
    verdicts = defense.certify(images, labels)
    windows = [(w.top, w.left, w.height, w.width) for (w,) in masks.windows]
    for image, label, verdict in zip(images, labels.tolist(), verdicts, strict=True):
        table = naive_table(model, image, windows, defense.fill)
        assert verdict.certified == oracle.certified(table, label)
        assert (verdict.defended_label, verdict.case) == oracle.double_masking(table)
        with torch.no_grad():
            assert verdict.vanilla_label == int(model(image[None]).argmax())
    assert defense.predict(images).tolist() == [verdict.defended_label for verdict in verdicts]
    for other in ({"exhaustive": True}, {"shared_prefix": True}):
        again = cp.PatchCleanser(model, masks, batch_size=50, **other).certify(images, labels)
        for a, b in zip(again, verdicts, strict=True):
            assert (a.vanilla_label, a.defended_label, a.case, a.certified) == (
                b.vanilla_label,
                b.defended_label,
                b.case,
                b.certified,
            )
    return verdicts


def test_digits(tmp_path):
    """Real handwritten digits, a network trained for a moment: all outcomes occur."""
    train, test = (
        load_source("digits", split="train").first(320),
        load_source("digits", split="test").first(24),
    )
    spec = describe(SMALL_CNN, classes=train.classes, num_classes=10)
    config = TrainConfig(
        strategy="random-cutout", patch_size=(5, 5), masks_per_axis=3, epochs=2, batch_size=16, lr=0.05
    )
    model = build(spec)
    fine_tune(
        model,
        spec,
        train,
        load_source("digits", split="test"),
        config,
        tmp_path / "run",
        fabric=make_fabric(device="cpu"),
    )
    items = [Images(test, spec)[i] for i in range(len(test))]
    images = as_float(torch.stack([item.pixels for item in items]))
    masks = cp.MaskSet.covering(image_size=(32, 32), patch_size=(5, 5), masks_per_axis=3)
    verdicts = check(model, images, torch.tensor([item.label for item in items]), masks)
    assert {verdict.certified for verdict in verdicts} == {True, False}
    assert "agreed" in {verdict.case for verdict in verdicts}


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data (the ImageNet sample)")
def test_photographs():
    """EfficientNet-Lite0 with its real weights on photographs of ImageNet."""
    root = SHARED / "imagenet-sample"
    source = load_source(str(root / "val.tar"), class_map=str(root / "class_map.txt")).first(2)
    spec = describe("tf_efficientnet_lite0", classes=source.classes, num_classes=1000)
    model = build(spec, weights=LITE0_PACKAGE)
    items = [Images(source, spec)[i] for i in range(len(source))]
    images = as_float(torch.stack([item.pixels for item in items]))
    masks = cp.MaskSet.covering(image_size=(224, 224), patch_size=(39, 39), masks_per_axis=2)
    check(model, images, torch.tensor([item.label for item in items]), masks)
