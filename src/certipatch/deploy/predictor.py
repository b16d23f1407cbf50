"""The defended model as it answers in use: pixels of images in, answers as JSON out.

``predict`` and the service use it. An exported predictor answers with the same entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import ModelSpec
from ..data.decode import decode, open_bytes
from ..data.source import as_float, evaluation_transform
from ..data.words import in_words
from ..defenses.patchcleanser.defense import PatchCleanser
from .said import Said


@dataclass(frozen=True)
class Predictor:
    """A defense around a model, and what its labels are called.

    Attributes:
        spec: makes a file into pixels, and labels into names.
        least: the least margin, in logits, of what counts as proven.
        shown: each class as people call it.
    """

    spec: ModelSpec
    defense: PatchCleanser
    least: float
    shown: Sequence[str]

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        defense: PatchCleanser,
        least: float = 0.0,
        names: Mapping[str, str] | None = None,
    ) -> Predictor:
        """``least`` is what the certification demands, if there is one; rounding here may demand more.
        ``names`` are words for class folders."""
        return cls(spec, defense, max(least, defense.least_margin), in_words(spec.classes, names))

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        return evaluation_transform(self.spec)

    def read(self, data: bytes) -> Tensor:
        """The pixels (3, H, W) uint8 that the model sees of the bytes of an image file.

        Raises one of ``data.decode.UNREADABLE``.
        """
        return self._transform(decode(open_bytes(data)))

    @cached_property
    def _said(self) -> Said:
        network, masks = self.defense.network, self.defense.masks
        way = {"masks_per_axis": masks.masks_per_axis, "precision": network.precision}
        way |= {"inference": self.defense.inference}
        threat, windows = dict(self.defense.threat), masks.to_json()["windows"]
        return Said(self.spec.classes, self.shown, threat, way, self.least, windows, self.spec.image_size)

    def about(self) -> dict[str, Any]:
        """What does not depend on the image: classes, image size, threat and masks, as JSON."""
        return {
            "model": self.spec.arch,
            "classes": list(self.spec.classes),
            "shown": list(self.shown),
            "image_size": list(self.spec.image_size),
            **self._said.threat,
            **self._said.way,
            "windows": self._said.windows,
            "min_margin": self.least,
        }

    def answer(self, pixels: Sequence[Tensor]) -> list[dict[str, Any]]:
        """The answer to each image (3, H, W) uint8, as JSON."""
        return [self._said.plain(verdict) for verdict in self.defense.examine(self._images(pixels))]

    def prove(self, pixels: Sequence[Tensor], *, places: bool = False) -> list[dict[str, Any]]:
        """The same, and what is proven of each answer: of all places of the patch, or by place too."""
        verdicts = self.defense.examine_proven(self._images(pixels), places=places)
        return [self._said.proven(verdict) for verdict in verdicts]

    def look(self, pixels: Tensor, *, prove: bool) -> dict[str, Any]:
        """The answer to one image, or its proof, also by place, with what a person wants to see of the views
        behind it."""
        images = self._images([pixels])
        found = self.defense.examine_proven(images, places=True) if prove else self.defense.examine(images)
        (verdict,) = found
        return self._said.seen(verdict, prove=prove)

    def _images(self, pixels: Sequence[Tensor]) -> Tensor:
        return as_float(torch.stack(list(pixels)).to(self.defense.network.device))
