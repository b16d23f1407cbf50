"""What the steps of an epoch have done so far: counts that become a line of ``epochs.jsonl``."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from ..errors import SoundnessError
from ..runtime.processes import total
from ..runtime.progress import percent
from .strategies import BACKWARD, FORWARD

LOOK = 16  # steps between two looks at what an accelerator has computed, at most


@dataclass(frozen=True)
class Step:
    """What one step has done, all processes together.

    Attributes:
        number: which one of its epoch, counted from 1. lr: its learning rate.
        loss: summed over the views. correct, views, images, passes, seconds: as in :class:`EpochCounts`.
    """

    number: int
    lr: float
    loss: float
    correct: float
    views: float
    images: float
    passes: float
    seconds: float

    @property
    def mean_loss(self) -> float:
        """The mean loss of a view."""
        return self.loss / self.views


class Unseen:
    """Steps whose numbers are on the device still: a step that asked for them would wait for it.

    On a CPU there is nothing to wait for, so each step is looked at.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self._steps: list[tuple[Tensor, dict[str, float]]] = []

    def add(
        self, logits: Tensor, targets: Tensor, loss: Tensor, images: int, searched: int, **known: float
    ) -> None:
        """Add a step of this process; ``known`` are its number, learning rate and seconds.

        Args:
            logits, targets: (views, classes) and (views,) of the masked copies.
            loss: their mean loss.
            images: how many images the views were made of.
            searched: forward passes of the search for the masks.
        """
        correct = (logits.detach().argmax(1) == targets).sum()
        views = len(logits)
        passes = searched * FORWARD + views * (FORWARD + BACKWARD)
        self._steps.append(
            (
                torch.stack([loss.detach().float(), correct.float()]),
                {"views": views, "images": images, "passes": passes, **known},
            )
        )

    def due(self, number: int, last: int) -> bool:
        """Whether it is time to look, after this step out of so many in the epoch: early ones come soon."""
        early = number & (number - 1) == 0  # 1, 2, 4, 8 ...
        return self.fabric.device.type == "cpu" or early or number % LOOK == 0 or number == last

    def look(self, **asked: bool) -> tuple[list[Step], dict[str, float]]:
        """Wait once for the device: the steps since the last look, and how many processes said yes to what is
        asked."""
        began = time.monotonic()
        rows = torch.stack([row for row, _ in self._steps]).tolist()
        mine = [
            (loss * known["views"], correct, known["views"], known["images"], known["passes"])
            for (loss, correct), (_, known) in zip(rows, self._steps, strict=True)
        ]
        numbers = {str(i): number for i, number in enumerate(chain.from_iterable(mine))}
        sums = total(self.fabric, {**numbers, **asked})
        values = iter(sums.values())
        self._steps[-1][1]["seconds"] += time.monotonic() - began
        steps = []
        for _, known in self._steps:
            loss, correct, views, images, passes = islice(values, 5)
            number, lr, seconds = int(known["number"]), known["lr"], known["seconds"]
            steps.append(Step(number, lr, loss, correct, views, images, passes, seconds))
        self._steps.clear()
        return steps, {name: sums[name] for name in asked}


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

    def add(self, steps: list[Step], epoch: int) -> None:
        """Add some steps of an epoch. Raises SoundnessError if a loss of theirs is not finite."""
        for step in steps:
            if not math.isfinite(step.mean_loss):
                raise SoundnessError(
                    f"loss: expected a finite number, found {step.mean_loss} in epoch {epoch + 1}, step "
                    f"{step.number}; lower --lr"
                )
            self.loss += step.loss
            self.correct += step.correct
            self.views += step.views
            self.images += step.images
            self.passes += step.passes
            self.seconds += step.seconds

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
