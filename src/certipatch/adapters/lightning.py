"""The masking strategies as a callback of Lightning (``pip install lightning``)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from ..errors import ConfigError
from ..geometry.masks import MaskSet
from ..training.strategies import STRATEGIES
from ..views.masked import mask_images, visible


class MaskedTraining(Callback):
    """Train a LightningModule on masked images: each batch ``[images, labels]`` becomes its masked copies.

    Args:
        strategy: a name in ``certipatch.STRATEGIES``; those of two copies double the batch.
        masks: the fine set, of the size of the images.
        network: images (N, 3, H, W) in [0, 1] -> logits, which a search asks; it is left as it was found.
        fill: the colour of a mask, a number or one for each channel. seed: of what is drawn.
    """

    def __init__(
        self, strategy: str, masks: MaskSet, network: nn.Module, *, fill: float = 0.5, seed: int = 0
    ) -> None:
        self.strategy, self.masks, self.network, self.fill = STRATEGIES[strategy], masks, network, fill
        self.generator = torch.Generator().manual_seed(seed)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        """Replace the entries of the batch, before the module sees it."""
        if not isinstance(batch, list) or len(batch) != 2:
            raise ConfigError(f"batch: expected a list of images and labels, found {type(batch).__name__}")
        images, labels = batch
        ask = partial(self.strategy, fill=self.fill, generator=self.generator)
        copies = ask(self.network, images, labels, self.masks)
        keeps = [visible(windows, self.masks.image_size) for windows in copies]
        batch[0] = torch.cat([mask_images(images, keep, torch.as_tensor(self.fill)) for keep in keeps])
        batch[1] = labels.repeat(len(keeps))
