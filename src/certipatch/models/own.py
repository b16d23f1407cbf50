"""The networks of our own by name, one row each: for the demo, and those that comparators need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..config import ModelSpec
from ..errors import ConfigError
from ..geometry.patch import Size, by
from .bagnet import SMALL_STRIDES, STAGES, BagNet, SmallBagNet
from .small import IBP_SMALL, SMALL_CNN, SmallCNN, small_ibp

Colour = tuple[float, float, float]
HALF: Colour = (0.5, 0.5, 0.5)
IMAGENET: tuple[Colour, Colour] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Own:
    """A network of our own.

    Attributes:
        build: (classes, image size) -> the bare network, with random weights.
        head: the name of its last layer in the state dict.
        image_size: the side of its images unless another is asked for. fixed: it takes no other.
        normalisation: mean and deviation of the colours.
    """

    build: Callable[[int, Size], nn.Module]
    head: str
    image_size: int = 32
    fixed: bool = False
    normalisation: tuple[Colour, Colour] = (HALF, HALF)


def _bagnet(classes: int, _size: Size, *, stages: int) -> nn.Module:
    return BagNet(classes, stages)


def _small_bagnet(classes: int, _size: Size, *, strides: tuple[int, ...]) -> nn.Module:
    return SmallBagNet(classes, strides)


def _small_vit(classes: int, size: Size) -> nn.Module:
    """timm's transformer with tokens of 4x4 pixels, 0.5 million weights."""
    return VisionTransformer(
        img_size=size, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=classes
    )


OWN: dict[str, Own] = {
    SMALL_CNN: Own(lambda classes, _: SmallCNN(classes), SmallCNN.HEAD, fixed=True),
    IBP_SMALL: Own(small_ibp, "7"),
    "small-vit": Own(_small_vit, "head"),
    **{name: Own(partial(_small_bagnet, strides=strides), "fc") for name, strides in SMALL_STRIDES.items()},
    **{
        name: Own(partial(_bagnet, stages=stages), "fc", 224, normalisation=IMAGENET)
        for name, stages in STAGES.items()
    },
}


def network_of(spec: ModelSpec) -> nn.Module:
    """The bare network of a spec, with random weights. Raises ConfigError for one that is not of ours."""
    if spec.arch not in OWN:
        raise ConfigError(f"model {spec.arch}: expected one of {', '.join(OWN)}")
    return OWN[spec.arch].build(spec.num_classes, spec.image_size)


def describe_own(
    name: str, classes: tuple[str, ...], num_classes: int, image_size: Size | None, crop_pct: float | None
) -> ModelSpec:
    """The spec of a network of our own. Raises ConfigError for an image size that it does not take."""
    row = OWN[name]
    default = (row.image_size, row.image_size)
    if row.fixed and image_size not in (None, default):
        raise ConfigError(
            f"model {name}: expected --image-size {row.image_size}, found {by(image_size or default)}; "
            "choose a timm model for other sizes"
        )
    mean, std = row.normalisation
    return ModelSpec(
        arch=name,
        num_classes=num_classes,
        classes=classes,
        image_size=image_size or default,
        mean=mean,
        std=std,
        crop_pct=crop_pct or 1.0,
    )
