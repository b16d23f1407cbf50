"""What PatchCleanser and Minority Reports share: a classifier that is looked at under masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import ROUNDING
from ..errors import ConfigError, SoundnessError
from ..geometry.masks import MaskSet
from ..geometry.patch import Size, Threat, whole
from ..views.masked import default_batch_size, find_mean
from ..views.network import Network
from .alone import measure_movement
from .contract import check_images, check_labels, check_model, check_same_type


class MaskedClassifier:
    """A classifier with a mask set that covers every patch, and the network that looks at masked images.

    Arguments and errors are those of :class:`certipatch.PatchCleanser`.
    """

    name: str

    def __init__(
        self,
        model: nn.Module,
        masks: MaskSet,
        *,
        fill: float | tuple[float, ...] | Tensor | None = None,
        batch_size: int | None = None,
        precision: str = "32-true",
        compile: bool = False,
        shared_prefix: bool | str = False,
    ) -> None:
        _check_types(model, masks)
        _check_masks(masks)
        self.masks = masks
        self.fill = mean_as_fill(model) if fill is None else colour(fill)
        self.batch_size = views_at_once(model, masks.image_size, batch_size)
        trains = any(module.training for module in model.modules())
        if compile or shared_prefix or not trains:  # both run the model as it is now
            check_model(model)
        self.network = Network(
            model,
            masks,
            fill=self.fill,
            batch_size=self.batch_size,
            precision=precision,
            compile=compile,
            shared_prefix=shared_prefix,
        )
        self._moved = None if trains else measure_movement(self.network, masks.image_size)

    @property
    def moved(self) -> float:
        """By how many logits the margin of a view moved at most with what is not in the view: rounding."""
        if self._moved is None:
            self._moved = measure_movement(self.network, self.masks.image_size)
        return self._moved

    @property
    def least_margin(self) -> float:
        """The least margin, in logits, of what counts as proven: more than rounding was seen to move one."""
        return max(ROUNDING[self.network.precision], self.moved)

    @property
    def model(self) -> nn.Module:
        """The undefended model."""
        return self.network.model

    @property
    def threat(self) -> Threat:
        """What the masks cover: every patch of these shapes, anywhere."""
        return self.masks.threat

    def check(self, images: Tensor, labels: Tensor | None) -> None:
        """Look at every premise that can be looked at, before each use. Raises SoundnessError."""
        check_model(self.model)
        _ = self.moved  # of a model that was in training mode until now, this is measured here
        self.network.check_unchanged()
        check_images(images, self.masks.image_size)
        check_labels(labels, images, self.network.classes)
        check_same_type(images, self.model)

    def describe(self) -> dict[str, Any]:
        """Masks, fill colour and precision: what can change a result."""
        return {
            "masks": self.masks.to_json(),
            "fill": self.fill.tolist(),
            "precision": self.network.precision,
        }

    def describe_network(self) -> dict[str, Any]:
        """Batch size, compilation and shared prefix, which change rounding only, and what rounding did."""
        return {**self.network.describe(), "moved": self.moved}


def _check_types(model: nn.Module, masks: MaskSet) -> None:
    for name, value, expected in (("model", model, nn.Module), ("masks", masks, MaskSet)):
        if not isinstance(value, expected):
            raise ConfigError(f"{name}: expected a {expected.__name__}, found {type(value).__name__}")


def _check_masks(masks: MaskSet) -> None:
    hole = masks.uncovered_patches()
    if hole is not None:
        raise SoundnessError(
            f"masks: expected every patch to be covered, found {' with '.join(map(str, hole))} that no mask "
            "covers; use MaskSet.covering"
        )


def mean_as_fill(model: nn.Module) -> Tensor:
    """The mean of the model's Normalize layer, in [0, 1]."""
    mean = torch.as_tensor(find_mean(model)).reshape(-1)
    if len(mean) not in (1, 3):
        raise ConfigError(f"model: expected a Normalize layer for 3 channels, found one for {len(mean)}")
    if not ((mean >= 0) & (mean <= 1)).all():
        values = ", ".join(f"{value:g}" for value in mean.tolist())
        raise ConfigError(
            f"model: expected a Normalize layer for images in [0, 1], found the mean {values}; images are in "
            "[0, 1]: if it is for 0 to 255, divide its mean and deviation by 255"
        )
    return colour(mean)


def colour(fill: float | tuple[float, ...] | Tensor) -> Tensor:
    """(3,) float32 in [0, 1]."""
    try:
        colour = torch.as_tensor(fill, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"fill: expected one value or three in [0, 1], found {fill!r}") from error
    if len(colour) not in (1, 3) or not ((colour >= 0) & (colour <= 1)).all():
        raise ConfigError(f"fill: expected one value or three in [0, 1], found {colour.tolist()}")
    return colour.expand(3)


def views_at_once(model: nn.Module, image_size: Size, asked: int | None) -> int:
    """The batch size asked for, or what suits the device. Raises ConfigError for what is no batch size."""
    asked = _batch_size_for(model, image_size) if asked is None else asked
    size = whole(asked, f"batch size {asked!r}")
    if size < 1:
        raise ConfigError(f"batch size {asked!r}: expected a whole number, at least 1 view")
    return size


def _batch_size_for(model: nn.Module, image_size: Size) -> int:
    """A CPU is fastest while a batch stays in its caches, an accelerator wants large ones."""
    parameter = next(model.parameters(), None)
    on_cpu = parameter is None or parameter.device.type == "cpu"
    return default_batch_size(image_size, pixels=2**17 if on_cpu else 2**23)
