"""The defended model as it answers in use: pixels of images in, answers as JSON out.

``predict`` and the service use it. An exported predictor answers with the same entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import ModelSpec
from ..data.decode import decode, open_bytes
from ..data.source import as_float, evaluation_transform
from ..data.words import in_words
from ..defenses.patchcleanser.defense import PatchCleanser
from ..defenses.patchcleanser.examination import PatchCleanserVerdict
from ..geometry.places import Places
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
        return Said(self.spec.classes, self.shown, dict(self.defense.threat), way, self.least)

    def about(self) -> dict[str, Any]:
        """What does not depend on the image: classes, image size, threat and masks, as JSON."""
        return {
            "model": self.spec.arch,
            "classes": list(self.spec.classes),
            "image_size": list(self.spec.image_size),
            **self._said.threat,
            **self._said.way,
            "windows": self.defense.masks.to_json()["windows"],
            "min_margin": self.least,
        }

    def answer(self, pixels: Sequence[Tensor]) -> list[dict[str, Any]]:
        """The answer to each image (3, H, W) uint8, as JSON."""
        return [self._said.plain(verdict) for verdict in self.defense.examine(self._images(pixels))]

    def prove(self, pixels: Sequence[Tensor], *, places: bool = False) -> list[dict[str, Any]]:
        """The same, and what is proven of each answer: of all places of the patch, or by place too."""
        verdicts = self.defense.examine_proven(self._images(pixels), places=places)
        return [self._said.proven(verdict, **self._by_place(verdict)) for verdict in verdicts]

    def look(self, pixels: Tensor, *, prove: bool) -> dict[str, Any]:
        """The answer to one image, or its proof, with what a person wants to see of the views behind it."""
        images = self._images([pixels])
        (verdict,) = self.defense.examine_proven(images) if prove else self.defense.examine(images)
        return self._said.seen(verdict, prove=prove)

    def _images(self, pixels: Sequence[Tensor]) -> Tensor:
        return as_float(torch.stack(list(pixels)).to(self.defense.network.device))

    def _by_place(self, verdict: PatchCleanserVerdict) -> dict[str, Any]:
        """The masks whose rows are proven beyond rounding, and the share of places that they hide; nothing
        if it was not asked for."""
        if verdict.proven is None:
            return {}
        rows = np.array([bit == "1" for bit in verdict.proven])
        rows[rows] = np.array(verdict.proven_margins) >= self.least
        masks = self.defense.masks
        share = Places.of(masks.windows, masks.image_size, masks.threat).share(rows)
        return {"proven_share_of_places": share, "proven_masks": np.flatnonzero(rows).tolist()}
