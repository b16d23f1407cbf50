"""Networks of limited sight: what their cells see is measured, and refused if it is more than they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from certipatch.config import ModelSpec
from certipatch.errors import ConfigError, ModelError, SoundnessError
from certipatch.geometry.sights import cells as cells_of
from certipatch.models.bagnet import BagNet, SmallBagNet
from certipatch.models.build import build, describe
from certipatch.models.own import OWN
from certipatch.views.cells import CellLogits, check_sights

SMALL = {"small-bagnet": (5, 1), "small-bagnet-7": (7, 1), "small-bagnet-9": (9, 2)}


def tiny(stages, classes=4):
    """A BagNet of one block a stage."""
    torch.manual_seed(stages)
    return BagNet(classes, stages, blocks=(1, 1, 1, 1)).eval()


def naive_reach(network, size):
    """(cells, H, W) bool: the pixels that move a cell when they change, one after the other."""
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    before = network.cells(image)[0]
    found = torch.zeros(len(before), *size, dtype=torch.bool)
    for y in range(size[0]):
        for x in range(size[1]):
            other = image.clone()
            other[0, :, y, x] += 3.0
            found[:, y, x] = (network.cells(other)[0] - before).abs().amax(dim=1) > 0
    return found


def rectangles(network, size):
    found = torch.zeros(len(network.sights(size)), *size, dtype=torch.bool)
    for cell, (box,) in enumerate(network.sights(size)):
        found[cell, box.top : box.top + box.height, box.left : box.left + box.width] = True
    return found


@pytest.mark.parametrize(("stages", "field", "cells"), [(2, 9, 27), (3, 17, 26), (4, 33, 24)])
@torch.no_grad()
def test_a_bagnet_has_the_field_and_the_cells_of_its_paper(stages, field, cells):
    network = tiny(stages)
    assert (network.field, network.stride) == (field, 8)
    assert network.cells(torch.rand(1, 3, 224, 224)).shape == (1, cells**2, 4)
    size = (42, 50)
    check_sights(CellLogits(network), network.sights(size), size)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_a_small_bagnet_sees_its_squares_and_all_of_them(name):
    torch.manual_seed(0)
    network = OWN[name].build(3, (14, 12)).eval()
    assert (network.field, network.stride) == SMALL[name]
    seen = naive_reach(network, (14, 12))
    assert not (seen & ~rectangles(network, (14, 12))).any()
    assert seen.flatten(1).any(dim=1).all()
    check_sights(CellLogits(network), network.sights((14, 12)), (14, 12))


@torch.no_grad()
def test_a_bagnet_sees_its_squares_and_not_more():
    network = tiny(2)
    assert not (naive_reach(network, (17, 10)) & ~rectangles(network, (17, 10))).any()


class Padded(SmallBagNet):
    """The twin whose first convolution is padded: a cell sees pixels above and left of its square."""

    def __init__(self, classes):
        super().__init__(classes)
        self.features[0].padding = (1, 1)
        self.features[3].padding = (1, 1)

    def sights(self, image_size):
        height, width = image_size
        return cells_of((height + 4, width + 4), self.field, self.stride)


class Wider(SmallBagNet):
    """The twin with one more 3x3 convolution than it says, padded so that the number of cells is the same."""

    def __init__(self, classes):
        super().__init__(classes)
        self.features.append(nn.Conv2d(192, 192, 3, padding=1))


class WholeImage(SmallBagNet):
    """The twin whose cells know the mean of the whole image, as squeeze-and-excitation does."""

    def cells(self, images):
        return super().cells(images) + images.mean(dim=(1, 2, 3))[:, None, None]


class Hidden(SmallBagNet):
    """The twin in which a comparison stops NaN on its way."""

    def cells(self, images):
        found = super().cells(images)
        return torch.where(images.mean(dim=(1, 2, 3))[:, None, None] > 0.5, found, -found)


class Escaping(SmallBagNet):
    """The twin that computes in numpy, where nothing follows NaN."""

    def cells(self, images):
        return super().cells(torch.from_numpy(images.numpy() * 1.0))


@pytest.mark.parametrize(
    ("twin", "complaint"),
    [
        (Padded, "found that it sees some of"),
        (Wider, "found that it sees some of"),
        (WholeImage, "found that it sees some of"),
        (Hidden, "known to carry NaN on"),
        (Escaping, "torch's tensors alone"),
    ],
)
def test_a_network_that_sees_more_is_refused(twin, complaint):
    torch.manual_seed(0)
    network, size = twin(3).eval(), (14, 12)
    with pytest.raises(SoundnessError, match=complaint):
        check_sights(CellLogits(network), network.sights(size), size)


def test_a_field_that_is_stated_too_small_is_refused():
    network, size = SmallBagNet(3).eval(), (14, 14)
    smaller = [(replace(box, height=4, width=4),) for (box,) in network.sights(size)]
    with pytest.raises(SoundnessError, match="expected to see 4x4 pixels at row 0, column 0, and no others"):
        check_sights(CellLogits(network), smaller, size)


@pytest.mark.parametrize("name", ["small-bagnet", "small-bagnet-9", "bagnet17"])
def test_it_is_an_ordinary_model_whose_answer_is_the_mean_of_its_cells(name):
    spec = describe(name, classes=("a", "b", "c"), num_classes=3, image_size=(34, 40))
    model = build(spec)
    images = torch.rand(2, 3, 34, 40)
    cells = CellLogits(model)
    with torch.inference_mode():
        assert torch.allclose(model(images), cells(images).mean(dim=1), atol=1e-6)
    check_sights(cells, cells.sights((34, 40)), (34, 40))


def test_cells_are_counted_row_by_row():
    network = SmallBagNet(3).eval()
    images = torch.zeros(1, 3, 12, 10)
    images[:, :, :5, 5:] = torch.nan
    with torch.no_grad():
        reached = network.cells(images)[0].isnan().any(dim=1)
    assert reached.nonzero()[:, 0].tolist() == [
        n for n, (box,) in enumerate(network.sights((12, 10))) if box.top < 5 and box.left + 5 > 5
    ]


def test_the_authors_names_of_weights_load(tmp_path):
    """A state dict of bag-of-local-features-models: its names, and a head of 1,000 classes."""
    names = set(BagNet(1000, 3).state_dict())
    assert {"conv1.weight", "conv2.weight", "bn1.running_mean", "fc.bias"} <= names
    assert {"layer1.0.conv1.weight", "layer3.5.bn3.bias", "layer4.0.downsample.1.weight"} <= names
    file = tmp_path / "bagnet17.pth"
    torch.save(tiny(3, classes=1000).state_dict(), file)
    spec = ModelSpec(**{**describe("bagnet17", classes=(), num_classes=5).model_dump(), "classes": ()})
    with pytest.raises(ModelError, match="tell 1000 classes apart"):
        build(spec, weights=str(file))


def test_other_networks_and_small_images_are_refused():
    with pytest.raises(ConfigError, match="expected a network with cells"):
        CellLogits(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    with pytest.raises(ConfigError, match="does not take images of 16x16 pixels"):
        build(describe("bagnet17", classes=(), num_classes=3, image_size=(16, 16)))
    with pytest.raises(ConfigError, match="windows cells:17"):
        tiny(3).sights((16, 16))
