"""A linear classifier of 6x6 images, of which some are certified and a patch of 2x2 pixels breaks others."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import nn

from certipatch.certification.certify import certify as certify_opened
from certipatch.config import ModelSpec
from certipatch.data.source import Images, Source
from certipatch.geometry.masks import MaskSet
from certipatch.models.runs import Opened
from certipatch.runtime.devices import make_fabric

SIZE, PATCH, CLASSES = (6, 6), (2, 2), 3
MASKS = MaskSet.covering(image_size=SIZE, patch_size=PATCH, masks_per_axis=3)


class Grey(nn.Module):
    """(N, 3, H, W) -> (N, H*W): only the mean of the three colours counts, so that black and white patches
    are all there is to try."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(1).flatten(1) - 0.5


def world(n: int = 32) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A linear classifier of 6x6 images, images (n, 3, 6, 6) uint8 from clear to faint examples of its
    classes, their labels."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(CLASSES, SIZE[0] * SIZE[1], generator=generator)
    linear = nn.Linear(SIZE[0] * SIZE[1], CLASSES, bias=False)
    linear.weight.data = weights
    labels = torch.arange(n) % CLASSES
    strength = torch.linspace(0.05, 0.3, n)[:, None]
    grey = 0.5 + strength * weights[labels].sign() * torch.rand(n, 36, generator=generator)
    pixels = (
        (grey.clamp(0, 1) * 255).round().to(torch.uint8).view(n, 1, *SIZE).expand(n, 3, *SIZE).contiguous()
    )
    return nn.Sequential(Grey(), linear).eval(), pixels, labels


def certify(
    folder: Path, masks: MaskSet = MASKS, n: int = 32, *, mislabelled: int = 0, **options: str
) -> tuple[Opened, Source]:
    """Certify the first ``n`` images of the world; the model and the images.

    The last ``mislabelled`` of them have the label of another class.
    """
    network, pixels, labels = world(n)
    labels[n - mislabelled :] = (labels[n - mislabelled :] + 1) % CLASSES

    def image(index: int) -> Image.Image:
        return Image.fromarray(pixels[index].permute(1, 2, 0).numpy(), "RGB")

    classes, half = tuple("abc"), (0.5, 0.5, 0.5)
    source = Source(classes, [f"{index}" for index in range(n)], labels.tolist(), image)
    spec = ModelSpec(arch="linear", num_classes=3, classes=classes, image_size=SIZE, mean=half, std=half)
    opened = Opened.of(spec, network)
    certify_opened(opened, source, masks, folder, fabric=make_fabric(device="cpu"), **options)
    assert torch.equal(Images(source, spec)[5].pixels, pixels[5])
    return opened, source
