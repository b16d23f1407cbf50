"""PatchCleanser around a model: ``predict`` and ``certify``, both read from one examination of the images.

The labels of masked views come from the network (``views/network.py``), what is asked next from the schedule,
and the decisions from the integer algorithms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...geometry.masks import MaskSet
from ..contract import check_labels
from ..masked import MaskedClassifier
from .algorithms import INFERENCES, Inference
from .examination import Examination, PatchCleanserVerdict


class PatchCleanser(MaskedClassifier):
    """A classifier defended by double masking, with a certificate against every patch its masks cover.

    Source: PatchCleanser (USENIX Security 2022), Algorithms 1 (predict) and 2 (certify), and challenger
    masking from its code.

    Args:
        model: maps (N, 3, H, W) float in [0, 1] to (N, classes) logits, normalisation inside, in evaluation
            mode.
        masks: cover whatever the attacker may place (``masks.threat``); checked here.
        fill: colour of masked pixels, a number or (3,) in [0, 1]; default: the mean of the model's Normalize
            layer (so 0 after normalisation), or 0.5 for a model without one.
        batch_size: views in one forward pass; default by image size.
        exhaustive: compute every pair of every image, also where the answer is already settled.
        inference: "double-masking" (Algorithm 1), or "challenger": where masks disagree, at most one pass for
            each mask but one, and not one for each pair. Both answer the label of a certified image under
            every patch; on others they may differ.
        places: with labels, find out for which masks the whole row is right, which proves the answer at the
            places of the patch that they hide (``proven`` of the verdict). It costs further views of images
            that are not certified.
        precision: "32-true", or "bf16-mixed" or "16-mixed" for a forward pass under autocast.
        compile: compile the network with torch.compile, its weights frozen as they are now: some times faster
            after some seconds to a minute. Where it cannot be compiled, a line says so and
            ``network.compiled`` is False.
        shared_prefix: run the first, local layers of a CNN for the one-mask views only, if the model has
            such; or the name of the layer where they end (``network.prefix.layer`` of an earlier one).

    Raises:
        SoundnessError: the masks do not cover every patch; on use: training mode, a model that changed since
            it was compiled or cut, images of another size or outside [0, 1], logits that are not finite.
        ConfigError: an unknown precision or inference, a fill that is no colour.
    """

    name = "patchcleanser"

    def __init__(
        self,
        model: nn.Module,
        masks: MaskSet,
        *,
        fill: float | tuple[float, ...] | Tensor | None = None,
        batch_size: int | None = None,
        exhaustive: bool = False,
        inference: Inference = "double-masking",
        places: bool = False,
        precision: str = "32-true",
        compile: bool = False,
        shared_prefix: bool | str = False,
    ) -> None:
        if inference not in INFERENCES:
            raise ConfigError(f"inference {inference!r}: expected one of {', '.join(INFERENCES)}")
        self.exhaustive, self.inference, self.places = exhaustive, inference, places
        super().__init__(
            model,
            masks,
            fill=fill,
            batch_size=batch_size,
            precision=precision,
            compile=compile,
            shared_prefix=shared_prefix,
        )

    def predict(self, images: Tensor) -> Tensor:
        """The defended labels (N,) int64 of (N, 3, H, W) float images in [0, 1]."""
        return torch.tensor([verdict.defended_label for verdict in self.examine(images)], dtype=torch.int64)

    def certify(self, images: Tensor, labels: Tensor) -> list[PatchCleanserVerdict]:
        """Algorithm 2: one verdict an image. Certified: ``predict`` answers the label under every patch.

        Args:
            images: (N, 3, H, W) float in [0, 1].
            labels: (N,) int64, the true classes.
        """
        return self.examine(images, labels)

    @torch.inference_mode()
    def examine(self, images: Tensor, labels: Tensor | None = None) -> list[PatchCleanserVerdict]:
        """The verdicts behind both: with labels the certificates too, without them only what the inference
        needs.

        All images share the forward passes: batches are filled with the next missing pairs of the images that
        are still undecided, and a decided image makes room for another.
        """
        self.check(images, labels)
        truth: list[int | None] = [None] * len(images) if labels is None else [int(label) for label in labels]
        verdicts = Examination(
            self.network,
            self.masks,
            images,
            truth,
            exhaustive=self.exhaustive,
            inference=self.inference,
            places=self.places,
        ).run()
        check_labels(labels, images, self.network.classes)
        return verdicts

    def describe(self) -> dict[str, Any]:
        """What can change a result. What is usual is not named, as in runs from before there was a choice."""
        challenger = {} if self.inference == "double-masking" else {"inference": self.inference}
        by_place = {"places": True} if self.places else {}
        return {**super().describe(), "exhaustive": self.exhaustive, **challenger, **by_place}
