"""A model defended by evidence as it answers in use: ``predict`` on a folder of ds, smoothed-vit, patchguard.

What is said of one answer is what a label would certify: if no patch can turn the answer on this image, then
no patch turned it either, for "differs within one patch" goes both ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ModelSpec
from ..data.source import as_float
from ..data.words import in_words
from ..defenses.evidence.defense import WindowDefense, WindowVerdict
from ..errors import ConfigError
from .claims import proof_of, statement


@dataclass(frozen=True)
class WindowPredictor:
    """A defense by evidence around a model, and what its labels are called; as
    :class:`~certipatch.deploy.predictor.Predictor`.

    Attributes:
        least: the least margin, in logits, of what counts as proven.
    """

    spec: ModelSpec
    defense: WindowDefense
    least: float
    shown: Sequence[str]

    @classmethod
    def of(
        cls, spec: ModelSpec, defense: WindowDefense, least: float, names: Mapping[str, str] | None = None
    ) -> WindowPredictor:
        """``names`` are words for class folders."""
        return cls(spec, defense, max(least, defense.least_margin), in_words(spec.classes, names))

    def answer(self, pixels: Sequence[Tensor]) -> list[dict[str, Any]]:
        """The answer to each image (3, H, W) uint8, as JSON."""
        return [self._plain(verdict) for verdict in self.defense.examine(self._images(pixels))]

    def prove(self, pixels: Sequence[Tensor], *, places: bool = False) -> list[dict[str, Any]]:
        """The same, and what is proven of each answer. Raises ConfigError for ``places``."""
        if places:
            raise ConfigError(
                f"--places: expected a certification of patchcleanser, found {self.defense.name}"
            )
        return [self._proven(verdict) for verdict in self.defense.examine_proven(self._images(pixels))]

    def _images(self, pixels: Sequence[Tensor]) -> Tensor:
        device = next(self.defense.windows.model.parameters()).device
        return as_float(torch.stack(list(pixels)).to(device))

    def _plain(self, verdict: WindowVerdict) -> dict[str, Any]:
        label, vanilla = verdict.defended_label, verdict.vanilla_label
        assert label is not None  # a rule on evidence always answers
        words = {} if self.shown[label] == self.spec.classes[label] else {"class_in_words": self.shown[label]}
        stated = self.defense.describe()
        return {
            **{"label": label, "class": self.spec.classes[label]},
            **{"vanilla_label": vanilla, "vanilla_class": self.spec.classes[vanilla]},
            **self.defense.threat,
            **{"defense": self.defense.name, "windows": stated["windows"], "rule": stated["rule"]},
            "precision": stated["precision"],
            **words,
        }

    def _proven(self, verdict: WindowVerdict) -> dict[str, Any]:
        plain = self._plain(verdict)
        proof = proof_of(bool(verdict.certified), verdict.margin or 0.0, self.least)
        views = "the windows say {name}"
        return {
            **plain,
            "unchangeable": proof == "unchangeable",
            "margin": verdict.margin,
            "min_margin": self.least,
            **{"slack": verdict.slack, "weakest": verdict.weakest, "rival": verdict.rival},
            "passes": verdict.passes,
            "statement": statement(proof, plain["class"], dict(self.defense.threat), views),
        }
