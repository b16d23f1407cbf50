"""What the steps of an epoch have done so far: counts that become a line of ``epochs.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import SoundnessError
from ..runtime.progress import percent
from .strategies import BACKWARD, FORWARD


def count_step(
    logits: Tensor, targets: Tensor, loss: Tensor, *, images: int, searched: int
) -> dict[str, float]:
    """What one step of one process has done, as numbers that may be summed over the processes.

    Args:
        logits, targets: (views, classes) and (views,) of the masked copies.
        loss: their mean loss.
        images: how many images the views were made of.
        searched: forward passes of the search for the masks.
    """
    views = len(logits)
    return {
        "loss": loss.item() * views,
        "correct": int((logits.argmax(1) == targets).sum()),
        "views": views,
        "images": images,
        "passes": searched * FORWARD + views * (FORWARD + BACKWARD),
    }


@dataclass
class EpochCounts:
    """The steps of an epoch so far, all processes together.

    Attributes:
        loss: summed over the views.
        correct: views whose label the model found, before the step.
        views: masked copies of images.
        images: images that the views were made of.
        passes: what search and gradient steps cost, in forward passes.
        seconds: of process 0.
    """

    loss: float = 0.0
    correct: float = 0
    views: float = 0
    images: float = 0
    passes: float = 0
    seconds: float = 0.0

    def add(self, step: Mapping[str, float], seconds: float) -> None:
        """Add a step, as :func:`count_step` counts it."""
        self.loss += step["loss"]
        self.correct += step["correct"]
        self.views += step["views"]
        self.images += step["images"]
        self.passes += step["passes"]
        self.seconds += seconds

    def line(self, epoch: int, lr: float) -> dict[str, Any]:
        """What the line of ``epochs.jsonl`` for the complete ``epoch``, counted from 0, says of its steps;
        ``lr`` is that of the last."""
        return {
            "epoch": epoch + 1,
            "lr": lr,
            "loss": self.loss / self.views,
            "masked_correct": int(self.correct),
            "masked_views": int(self.views),
            "images": int(self.images),
            "forward_equivalents": int(self.passes),
            "seconds": round(self.seconds, 3),
        }

    def note(self, epoch: int, epochs: int, lines: list[dict[str, Any]]) -> str:
        """What a run under way is worth: this epoch so far, and the vanilla accuracy after the last of the
        ``lines``."""
        right = percent(int(self.correct), int(self.views))
        so_far = (
            f"epoch {epoch + 1}/{epochs}, loss {self.loss / self.views:.3f}, right under the masks {right}"
        )
        if not lines:
            return so_far
        last = lines[-1]["validation_vanilla"]
        return f"{so_far}, validation vanilla accuracy {percent(last['correct'], last['images'])}"


def mean_loss(step: Mapping[str, float], epoch: int, number: int) -> float:
    """The mean loss of a step over its views. Raises SoundnessError if it is not finite."""
    mean = step["loss"] / step["views"]
    if not math.isfinite(mean):
        raise SoundnessError(
            f"loss: expected a finite number, found {mean} in epoch {epoch + 1}, step {number}; lower --lr"
        )
    return mean
