"""Minority Reports around a model: the undefended label, and an alarm where a confident view disagrees with
it.

What follows from labels and confidences, and why a certificate holds, is in ``algorithm.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...geometry.masks import MaskSet
from ...views.masked import check_logits, window_tensor
from ..contract import Verdict, check_labels
from ..masked import MaskedClassifier
from .algorithm import above, agreement, check_threshold, dissent


@dataclass(frozen=True, kw_only=True)
class Detection(Verdict):
    """What Minority Reports found out about one image; the first six fields are those of every verdict.

    Attributes:
        vanilla_label: the undefended model's label F(x), which is the answer unless there is an alarm.
        defended_label: the same, None if there is an alarm.
        certified: under every patch the answer is the true label or there is an alarm; None if no label was
            given.
        margin: None; the confidences below say how near the alarm was.
        alarm: a one-mask label other than F(x) has a confidence above the threshold.
        agreement: the smallest one-mask confidence if all one-mask labels are the true one, else None: the
            image is certified at every threshold below it.
        dissent: the largest confidence of a one-mask label other than F(x), else None: there is an alarm at
            every threshold below it.
    """

    alarm: bool
    agreement: float | None
    dissent: float | None


class MinorityReports(MaskedClassifier):
    """A classifier that raises an alarm where there may be a patch, certified against every patch its masks
    cover.

    Source: Minority Reports (McCoyd et al., 2020), with PatchCleanser's masks. K+1 forward passes an image
    for K masks.

    Args:
        threshold: tau, from 0 to 1. A lower one certifies more images and raises more false alarms.
        model, masks, fill, batch_size, precision, compile: as of :class:`certipatch.PatchCleanser`.

    Raises:
        SoundnessError: as of :class:`certipatch.PatchCleanser`.
        ConfigError: a threshold outside [0, 1], an unknown precision, a fill that is no colour.
    """

    name = "minority-reports"

    def __init__(
        self,
        model: nn.Module,
        masks: MaskSet,
        *,
        threshold: float,
        fill: float | tuple[float, ...] | Tensor | None = None,
        batch_size: int | None = None,
        precision: str = "32-true",
        compile: bool = False,
    ) -> None:
        self.threshold = check_threshold(threshold)
        super().__init__(model, masks, fill=fill, batch_size=batch_size, precision=precision, compile=compile)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The labels (N,) int64 and the alarms (N,) bool of (N, 3, H, W) float images in [0, 1].

        Where there is an alarm, the label must not be used.
        """
        found = self.examine(images)
        labels = torch.tensor([one.vanilla_label for one in found], dtype=torch.int64)
        return labels, torch.tensor([one.alarm for one in found], dtype=torch.bool)

    def certify(self, images: Tensor, labels: Tensor) -> list[Detection]:
        """One detection an image. Certified: under every patch ``predict`` answers the label, or raises an
        alarm.

        Args:
            images: (N, 3, H, W) float in [0, 1].
            labels: (N,) int64, the true classes.
        """
        return self.examine(images, labels)

    @torch.inference_mode()
    def examine(self, images: Tensor, labels: Tensor | None = None) -> list[Detection]:
        """The detections behind both; with labels the certificates too."""
        self.check(images, labels)
        n, k = len(images), len(self.masks)
        windows = window_tensor(self.masks, images.device)
        windows = torch.cat([torch.zeros_like(windows[:1]), windows])  # the first hides nothing
        which = torch.arange(n, device=images.device).repeat_interleave(k + 1)
        mask = torch.arange(k + 1, device=images.device).repeat(n)
        answers, confidences = np.empty(n * (k + 1), np.int64), np.empty(n * (k + 1))
        for start in range(0, len(which), self.batch_size):
            part = slice(start, start + self.batch_size)
            logits = self.network(images[which[part]], windows[mask[part]])
            answers[part], confidences[part] = _read(logits, len(mask[part]))
        check_labels(labels, images, self.network.classes)
        truth = [None] * n if labels is None else labels.tolist()
        tables = answers.reshape(n, k + 1).tolist(), confidences.reshape(n, k + 1).tolist()
        return [self._decide(*of_image) for of_image in zip(truth, *tables, strict=True)]

    def _decide(self, label: int | None, answers: list[int], confidences: list[float]) -> Detection:
        """The detection of one image, from the answers to its unmasked view and then its one-mask views."""
        vanilla, masked, of_masked = answers[0], answers[1:], confidences[1:]
        against = dissent(vanilla, masked, of_masked)
        together = None if label is None else agreement(label, masked, of_masked)
        alarm = above(against, self.threshold)
        return Detection(
            label=label,
            vanilla_label=vanilla,
            defended_label=None if alarm else vanilla,
            certified=None if label is None else above(together, self.threshold),
            margin=None,
            passes=len(answers),
            alarm=alarm,
            agreement=together,
            dissent=against,
        )


def _read(logits: Tensor, views: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (the first of equals) and their confidences.

    Confidences are computed in double precision, so that those near 1 are told apart.
    """
    logits = check_logits(logits, views).cpu()
    labels = logits.argmax(dim=1)
    confidences = logits.double().softmax(dim=1).gather(1, labels[:, None])[:, 0]
    return labels.numpy(), confidences.numpy()
