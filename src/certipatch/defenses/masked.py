"""TODO."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SoundnessError
from ..geometry.masks import MaskSet
from ..views.masked import default_batch_size, find_mean
from ..views.network import Network
from .contract import _check_model


class MaskedClassifier:
    """A classifier that is looked at under masks: the premises of every certificate, and its network.

    Arguments and errors are those of :class:`PatchCleanser`.
    """

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
        hole = masks.uncovered_patches()
        if hole is not None:
            raise SoundnessError(
                f"masks: expected every patch to be covered, found {' with '.join(map(str, hole))} that no "
                "mask covers; use MaskSet.covering"
            )
        self.masks = masks
        colour = torch.as_tensor(find_mean(model) if fill is None else fill, dtype=torch.float32).reshape(-1)
        if len(colour) not in (1, 3) or not ((colour >= 0) & (colour <= 1)).all():
            raise ConfigError(f"fill: expected one value or three in [0, 1], found {colour.tolist()}")
        self.fill = colour.expand(3)
        parameter = next(model.parameters(), None)
        on_cpu = parameter is None or parameter.device.type == "cpu"
        # A CPU is fastest while a batch stays in its caches, an accelerator wants large ones.
        default = default_batch_size(masks.image_size, pixels=2**17 if on_cpu else 2**23)
        self.batch_size = default if batch_size is None else batch_size
        if self.batch_size < 1:
            raise ConfigError(f"batch size {batch_size}: expected at least 1 view")
        if compile or shared_prefix:  # both run the model as it is now
            _check_model(model)
        self.network = Network(
            model,
            masks,
            fill=self.fill,
            batch_size=self.batch_size,
            precision=precision,
            compile=compile,
            shared_prefix=shared_prefix,
        )

    @property
    def model(self) -> nn.Module:
        return self.network.model

    def check(self, images: Tensor, labels: Tensor | None) -> None:
        """Every premise that can be looked at, before each use."""
        _check_model(self.model)
        self.network.check_unchanged()
        self._check_images(images, labels)

    def _check_images(self, images: Tensor, labels: Tensor | None) -> None:
        expected = (3, *self.masks.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise SoundnessError(
                f"images: expected (N, {', '.join(map(str, expected))}), found {tuple(images.shape)}; "
                "resize them or build masks of that size"
            )
        if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
            raise SoundnessError(
                "images: expected float values in [0, 1], found others; normalisation belongs inside the "
                "model"
            )
        if labels is None:
            return
        if (
            not isinstance(labels, Tensor)
            or labels.dtype != torch.int64
            or labels.shape != images.shape[:1]
            or (labels < 0).any()
        ):
            found = (
                f"{labels.dtype} {tuple(labels.shape)}"
                if isinstance(labels, Tensor)
                else type(labels).__name__
            )
            raise SoundnessError(
                f"labels: expected an int64 tensor ({len(images)},) of classes from 0 up, found {found}"
            )
