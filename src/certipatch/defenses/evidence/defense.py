"""A certified defense by evidence: windows of limited sight speak, a rule on integers answers and certifies.

De-randomized Smoothing, Smoothed ViT, PatchGuard, Clipped BagNet and BagCert are this with another source of
logits, another evidence and another rule; which three make which is in ``certification/methods.py``. The
theorem of each rule is in its file; here a network is put in front of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...geometry.patch import Threat
from ...geometry.reach import Reach, touched
from ..contract import Verdict, check_images, check_labels, check_same_type
from .rules import Rule
from .votes import Evidence
from .windows import Windows

Rectangle = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True, kw_only=True)
class WindowVerdict(Verdict):
    """What a defense by evidence found out about one image; the first six fields are those of every verdict.

    Attributes:
        margin: by how many logits the difference of two classes may move in every window at once without
            loss of the certificate; None where there is none.
        slack: what the true label has to spare, in units of evidence: certified if it is 0 or more.
        slack_published: the same by the condition of the papers, which does not know the place; None where
            theirs is the same.
        weakest: the patch, or the patches at once, against which it has least.
        rival: the class that is nearest to winning there.
    """

    slack: int | None
    slack_published: int | None
    weakest: tuple[Rectangle, ...] | None
    rival: int | None


class WindowDefense:
    """A network whose windows speak, an evidence and a rule.

    Args:
        name: in manifests and on the command line.
        windows: the source of logits, of windows and their sights.
        evidence: how logits become integers.
        rule: from what a patch can reach to the rule.
        threat: what the certificate is against. The rule may answer alike for any.

    Raises ConfigError for a patch larger than the image.
    """

    def __init__(
        self,
        name: str,
        windows: Windows,
        evidence: Evidence,
        rule: Callable[[Reach], Rule],
        threat: Threat,
    ) -> None:
        self.name, self.windows, self.evidence, self._threat = name, windows, evidence, threat
        self.reach = touched(windows.sights, windows.image_size, threat)
        self._make_rule, self.rule = rule, rule(self.reach)

    def against(self, threat: Threat) -> WindowDefense:
        """The same network, windows and evidence against another threat."""
        return WindowDefense(self.name, self.windows, self.evidence, self._make_rule, threat)

    @property
    def threat(self) -> Threat:
        """What the certificate is against."""
        return self._threat

    @property
    def least_margin(self) -> float:
        """The least margin, in logits, of what counts as proven."""
        return self.windows.least_margin

    def predict(self, images: Tensor) -> Tensor:
        """The labels (N,) int64 of (N, 3, H, W) float images in [0, 1]."""
        answers = [verdict.defended_label for verdict in self.examine(images)]
        return torch.tensor(answers, dtype=torch.int64)

    def certify(self, images: Tensor, labels: Tensor) -> list[WindowVerdict]:
        """One verdict an image. Certified: under every patch ``predict`` answers the label.

        Args:
            images: (N, 3, H, W) float in [0, 1].
            labels: (N,) int64, the true classes.
        """
        return self.examine(images, labels)

    def examine_proven(self, images: Tensor) -> list[WindowVerdict]:
        """The verdicts of images without labels, with the answer itself in place of the label: ``certified``
        says that no patch turned it, and that none can.

        The theorem of each rule holds for any label, and an image that differs within one patch from another
        is one from which the other so differs.
        """
        return self._examine(images, None, proven=True)

    def examine(self, images: Tensor, labels: Tensor | None = None) -> list[WindowVerdict]:
        """The verdicts behind both; with labels the certificates too.

        Raises SoundnessError if a premise on the model or the images fails.
        """
        return self._examine(images, labels)

    @torch.inference_mode()
    def _examine(self, images: Tensor, labels: Tensor | None, *, proven: bool = False) -> list[WindowVerdict]:
        self.windows.check()
        check_images(images, self.windows.image_size)
        check_labels(labels, images, self.windows.classes)
        check_same_type(images, self.windows.model)
        if not len(images):
            return []
        logits, vanilla = self.windows.look(images)
        check_labels(labels, images, self.windows.classes)
        truth = [None] * len(images) if labels is None else labels.tolist()
        tables = zip(truth, vanilla.tolist(), logits.numpy(), strict=True)
        return [self._verdict(*of_image, proven=proven) for of_image in tables]

    def _verdict(self, label: int | None, vanilla: int, logits: np.ndarray, *, proven: bool) -> WindowVerdict:
        evidence = self.evidence.of(logits)
        answer = self.rule.label(evidence)
        label = answer if proven else label
        common: dict[str, Any] = {
            "label": label,
            "vanilla_label": vanilla,
            "defended_label": answer,
            "passes": self.windows.passes,
        }
        if label is None:
            nothing: dict[str, Any] = dict.fromkeys(
                ("certified", "margin", "slack", "slack_published", "weakest", "rival")
            )
            return WindowVerdict(**common, **nothing)
        least = self.rule.slack(evidence, label)
        certified = least.slack >= 0
        places = self.reach.places[least.place]
        return WindowVerdict(
            **common,
            certified=certified,
            margin=self._margin(logits, evidence, label, least.slack) if certified else None,
            slack=least.slack,
            slack_published=self.rule.published(evidence, label),
            weakest=tuple((p.top, p.left, p.height, p.width) for p in places),
            rival=least.rival,
        )

    def _margin(self, logits: np.ndarray, evidence: np.ndarray, label: int, slack: int) -> float:
        """By how many logits a certified image may move in every window.

        Votes change where logits come to a threshold: the windows that are nearest to theirs may say anything
        as long as the certificate holds, and the next one decides. Evidence that moves with the logits takes
        at most ``steps`` a logit and 1 of rounding from each of two sums over all windows.
        """
        if self.evidence.sure is None:
            each = slack / (2 * len(evidence)) - 1
            return max(0.0, each) / (self.evidence.steps or 1.0)
        sure = self.evidence.sure(logits)
        order = np.argsort(sure, kind="stable")
        return float(sure[order[self.rule.held_windows(evidence, label, order)]])

    def describe(self) -> dict[str, Any]:
        """Windows, evidence, rule, threat, fill and precision: what can change a result."""
        touch = self.reach.touch
        return {
            "threat": {"image_size": self.windows.image_size, **self.threat.keywords},
            **self.windows.describe(),
            "evidence": self.evidence.name,
            **self.evidence.settings,
            "rule": self.rule.name,
            "patch_size_known": self.rule.patch_size_known,
            "touched": {
                "windows": len(self.windows.sights),
                "sets": len(touch),
                "most": int(touch.sum(1).max()),
            },
        }

    def describe_network(self) -> dict[str, Any]:
        """How the network is run: what changes rounding only."""
        return self.windows.describe_network()
