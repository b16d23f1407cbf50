"""The parts of models that are our own: the normalisation in front, and small networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALL_CNN = "small-cnn"
IBP_SMALL = "ibp-small"


class Normalize(nn.Module):
    """(images - mean) / std for each channel; inside the model, so that its images stay in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class SmallCNN(nn.Sequential):
    """The demo's network for 32x32 images: four 3x3 convolutions with BatchNorm, 0.1 million weights."""

    HEAD = "13"  # the name of the last layer in the state dict

    def __init__(self, num_classes: int) -> None:
        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        layers = [*block(3, 16, 2), *block(16, 32, 2), *block(32, 64, 1), *block(64, 64, 2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, num_classes))


def small_ibp(num_classes: int, image_size: tuple[int, int]) -> nn.Sequential:
    """A network that bounds go through (:mod:`certipatch.views.intervals`): two convolutions and
    two linear layers, each with ReLU but the last; nothing else. 0.3 million weights at 32 pixels.

    Source: the shape of the networks of Chiang et al. (ICLR 2020), made smaller for a CPU.
    """
    height, width = ((n + 3) // 4 for n in image_size)  # halved twice, rounded up
    convolutions: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 2), (16, 32, 2)):
        convolutions += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU()]
    hidden = nn.Linear(32 * height * width, 128)
    return nn.Sequential(*convolutions, nn.Flatten(), hidden, nn.ReLU(), nn.Linear(128, num_classes))
