"""Ordinary augmentation: the image is flipped or cropped at random before anything is hidden from it."""

from __future__ import annotations

import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms import RandomResizedCrop  # type: ignore[import-untyped]
from torchvision.transforms.functional import (  # type: ignore[import-untyped]
    hflip,
    pil_to_tensor,
    resized_crop,
)

from ..config import ModelSpec
from ..data.source import Images, Item, Source
from ..runtime.devices import derived_seed
from .config import TrainConfig

AREA = (0.7, 1.0)  # the share of the image's area that a crop keeps
RATIO = (3 / 4, 4 / 3)  # and its width by its height


class Augmented(Images):
    """Images as a model trains on them, flipped and cropped as chance has it in each epoch.

    What is drawn depends on seed, epoch and image alone: not on the batch, the process or the worker.
    ``augment`` is that of :class:`~certipatch.training.config.TrainConfig`.
    """

    def __init__(self, source: Source, spec: ModelSpec, config: TrainConfig) -> None:
        super().__init__(source, spec)
        self.augment, self.seed = (config.augment or "").split(","), config.seed
        self.every = config.search_every or 1
        self.size, self.interpolation = list(spec.image_size), str_to_interp_mode(spec.interpolation)

    def __getitem__(self, index: int | tuple[int, int]) -> Item:
        """An image in an epoch: (index, epoch). Where masks are used again, it is what they were found on."""
        if isinstance(index, int):
            return super().__getitem__(index)
        index, epoch = index
        seed = derived_seed(self.seed, epoch - epoch % self.every, index, 1)
        return self.read(index, lambda image: self._change(image, seed))

    def _change(self, image: Image.Image, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if "flip" in self.augment and torch.rand(()) < 0.5:
                image = hflip(image)
            if "crop" not in self.augment:
                return self.transform(image)
            top, left, height, width = RandomResizedCrop.get_params(image, list(AREA), list(RATIO))
        crop = resized_crop(image, top, left, height, width, self.size, self.interpolation)
        pixels: Tensor = pil_to_tensor(crop)
        return pixels
