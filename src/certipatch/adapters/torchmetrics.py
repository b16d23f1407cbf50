"""Certified robust accuracy as a metric of torchmetrics (``pip install torchmetrics``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ..config import ROUNDING
from ..defenses.contract import CertifiedDefense


class CertifiedRobustAccuracy(Metric):
    """The share of images with a certificate: the defense is right under every patch of its threat, proven.

    ``metric.update(images, labels)`` takes images (N, 3, H, W) in [0, 1] and labels (N,), and examines them;
    ``metric.compute()`` is a scalar from 0 to 1. As in ``certipatch report``, a certificate counts if its
    margin is at least ``min_margin`` logits; None: what rounding in the defense's precision does not reach.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, defense: CertifiedDefense, min_margin: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        least = getattr(defense, "least_margin", max(ROUNDING.values()))
        self.defense, self.min_margin = defense, least if min_margin is None else min_margin
        for name in ("certified", "images"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Examine a batch."""
        for verdict in self.defense.examine(images, labels):
            enough = verdict.margin is None or verdict.margin >= self.min_margin
            self.certified += int(bool(verdict.certified) and enough)
            self.images += 1

    def compute(self) -> Tensor:
        """The share so far; nan without images."""
        return self.certified / self.images
