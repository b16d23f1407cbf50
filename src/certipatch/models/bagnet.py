"""BagNets: networks whose output cells see a small square of the image each, and nothing else of it.

Source: Brendel and Bethge, "Approximating CNNs with Bag-of-local-Features models works surprisingly well on
ImageNet" (ICLR 2019): a ResNet-50 most of whose 3x3 convolutions are 1x1, none padded. Modules are named as
in the authors' code, so that their weights load (``--weights FILE``). ``small-bagnet`` is for images of 32 to
48 pixels and a CPU: a few 3x3 convolutions, and 1x1 ones behind them.

Cell i along an axis sees the pixels ``stride i`` to ``stride i + field - 1``. That is not believed: before a
certificate rests on it, it is measured (:mod:`certipatch.views.cells`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..geometry.patch import Size
from ..geometry.sights import Sight
from ..geometry.sights import cells as cells_of

SMALL_STRIDES = {"small-bagnet": (1, 1), "small-bagnet-7": (1, 1, 1), "small-bagnet-9": (1, 2, 1)}
STAGES = {"bagnet9": 2, "bagnet17": 3, "bagnet33": 4}  # of four, how many have a 3x3 convolution


class Local(nn.Module, ABC):
    """A network that has logits for each cell; the logits of an image are their mean.

    Attributes:
        field, stride: the side of the square that a cell sees, and the distance of two of them, in pixels.
    """

    field: int
    stride: int
    fc: nn.Linear

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for another number of classes, as timm's models have it."""
        self.fc = nn.Linear(self.fc.in_features, num_classes)

    @abstractmethod
    def cells(self, images: Tensor) -> Tensor:
        """(N, cells, classes) logits of images (N, 3, H, W), row by row."""

    def sights(self, image_size: Size) -> tuple[Sight, ...]:
        """What each cell sees. Raises ConfigError for images smaller than one field."""
        return cells_of(image_size, self.field, self.stride)

    def forward(self, images: Tensor) -> Tensor:
        return self.cells(images).mean(dim=1)


class SmallBagNet(Local):
    """An unpadded 3x3 convolution for each of the strides, then two 1x1 ones; 0.06 million weights."""

    def __init__(self, num_classes: int, strides: tuple[int, ...] = (1, 1), width: int = 48) -> None:
        super().__init__()
        self.field, self.stride = 1, 1
        layers: list[nn.Module] = []
        inputs = 3
        for stride in strides:
            layers += _block(inputs, 2 * width if layers else width, kernel=3, stride=stride)
            inputs = 2 * width if len(layers) > 3 else width
            self.field += 2 * self.stride
            self.stride *= stride
        self.features = nn.Sequential(*layers, *_block(inputs, 4 * width, kernel=1, stride=1))
        self.fc = nn.Linear(4 * width, num_classes)

    def cells(self, images: Tensor) -> Tensor:
        return _logits(self.features(images), self.fc)


def _block(inputs: int, outputs: int, *, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _logits(features: Tensor, head: nn.Linear) -> Tensor:
    """The head on every place of a map (N, channels, h, w): (N, h w, classes)."""
    return head(features.flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


class BagNet(Local):
    """A ResNet-50 of small sight: field 9, 17 or 33 with 2, 3 or 4 stages that have a 3x3 convolution."""

    def __init__(self, num_classes: int, stages: int, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.field, self.stride = 3, 1
        self.conv1 = nn.Conv2d(3, 64, 1, bias=False)
        self.conv2 = nn.Conv2d(64, 64, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64, momentum=0.001)
        self.relu = nn.ReLU(inplace=True)
        inputs = 64
        for stage, (count, stride) in enumerate(zip(blocks, (2, 2, 2, 1), strict=True)):
            width, kernel = 64 * 2**stage, 3 if stage < stages else 1
            first = _Bottleneck(inputs, width, kernel, stride)
            rest = [_Bottleneck(4 * width, width, 1, 1) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            self.field += (kernel - 1) * self.stride
            self.stride *= stride
            inputs = 4 * width
        self.fc = nn.Linear(inputs, num_classes)

    def cells(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn1(self.conv2(self.conv1(images))))
        for stage in range(1, 5):
            features = self.get_submodule(f"layer{stage}")(features)
        return _logits(features, self.fc)


class _Bottleneck(nn.Module):
    """1x1, ``kernel``, 1x1, and a shortcut, which is cropped at the right and the lower border to fit."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != 4 * width:
            shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, features: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(features)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = features if self.downsample is None else self.downsample(features)
        return torch.relu(out + shortcut[:, :, : out.shape[2], : out.shape[3]])
