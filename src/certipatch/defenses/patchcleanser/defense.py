"""PatchCleanser around a model: ``predict`` and ``certify``, both read from one examination of the images.

The labels of masked views come from the network (``views/network.py``), what is asked next from the schedule,
and the decisions from the integer algorithms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...geometry.masks import MaskSet
from ..contract import check_labels
from ..masked import MaskedClassifier
from .algorithms import INFERENCES, Inference
from .examination import Examination, PatchCleanserVerdict


class Proven(NamedTuple):
    """Answers, and which of them no single patch changed or can change.

    Attributes:
        labels: (N,) int64, the defended labels.
        unchangeable: (N,) bool: the answer is the same on every image that differs from the received one
            within one patch that the masks cover, proven. It does not say that the answer is right, nor that
            there is no patch on the image.
        margins: (N,) float32, the smallest logit margin over the views that were looked at; of unchangeable
            answers over all views.
    """

    labels: Tensor
    unchangeable: Tensor
    margins: Tensor


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
        prove: with labels, also find out which answers are proven without one (``unchangeable`` of the
            verdict, of wrong answers too) and which images a wrong proof could come from (``forgeable``). It
            costs further views of images that are answered wrongly. :meth:`predict_proven` does without.
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
        prove: bool = False,
        precision: str = "32-true",
        compile: bool = False,
        shared_prefix: bool | str = False,
    ) -> None:
        if inference not in INFERENCES:
            raise ConfigError(f"inference {inference!r}: expected one of {', '.join(INFERENCES)}")
        self.exhaustive, self.inference = exhaustive, inference
        self.places, self.prove = places, prove
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
        labelled = labels is not None
        return self._examine(images, labels, places=self.places and labelled, prove=self.prove and labelled)

    @torch.inference_mode()
    def examine_proven(self, images: Tensor, *, places: bool = False) -> list[PatchCleanserVerdict]:
        """The verdicts behind :meth:`predict_proven`, with ``unchangeable`` as the labels alone have it.

        Args:
            images: (N, 3, H, W) float in [0, 1].
            places: also find out at which places of the patch the answer is proven, where not at all:
                ``proven`` of the verdict, for the answer.
        """
        return self._examine(images, None, places=places, prove=True)

    def predict_proven(self, images: Tensor, *, min_margin: float | None = None) -> Proven:
        """The answers, and which of them are proven: no single patch changed them or can change them.

        This is Theorem 1 read backwards, and needs no label: *all* views of the received image under one and
        two masks say the same. The received image may carry a patch itself.

        Args:
            images: (N, 3, H, W) float in [0, 1].
            min_margin: how far, in logits, each view must be from another label for the answer to count as
                proven; default: what rounding does not reach (:attr:`least_margin`).
        """
        verdicts = self.examine_proven(images)
        least = self.least_margin if min_margin is None else min_margin
        return Proven(
            torch.tensor([verdict.defended_label for verdict in verdicts], dtype=torch.int64),
            torch.tensor([bool(v.unchangeable) and v.margin >= least for v in verdicts], dtype=torch.bool),
            torch.tensor([verdict.margin for verdict in verdicts], dtype=torch.float32),
        )

    def _examine(
        self, images: Tensor, labels: Tensor | None, *, places: bool, prove: bool
    ) -> list[PatchCleanserVerdict]:
        self.check(images, labels)
        truth: list[int | None] = [None] * len(images) if labels is None else [int(label) for label in labels]
        verdicts = Examination(
            self.network,
            self.masks,
            images,
            truth,
            exhaustive=self.exhaustive,
            inference=self.inference,
            places=places,
            prove=prove,
        ).run()
        check_labels(labels, images, self.network.classes)
        return verdicts

    def describe(self) -> dict[str, Any]:
        """What can change a result. What is usual is not named, as in runs from before there was a choice."""
        challenger = {} if self.inference == "double-masking" else {"inference": self.inference}
        by_place = {"places": True} if self.places else {}
        proofs = {"prove": True} if self.prove else {}
        return {**super().describe(), "exhaustive": self.exhaustive, **challenger, **by_place, **proofs}
