"""The weights that a run ends with: the last ones or those of the best epoch, as they are or averaged."""

from __future__ import annotations

from typing import Any

from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .config import TrainConfig

HELD_OUT = "held_out_certified"  # in a line of epochs.jsonl


class Kept:
    """What will be the weights of the run, beside the model that is being trained.

    Attributes:
        average: the moving average of the model's weights and buffers, if the run has one.
        best: the weights of the best epoch so far, under the model's names; None if the last ones are kept.
    """

    def __init__(self, model: nn.Sequential, config: TrainConfig) -> None:
        self.model = model
        # In the first steps an average weighs what was before less, or a short run would end where it began.
        self.average = None if config.ema is None else ModelEmaV3(model, decay=config.ema, use_warmup=True)
        self.keeps_best = config.keep == "best"
        self.best: dict[str, Tensor] | None = None

    @property
    def now(self) -> nn.Sequential:
        """The model whose weights the run would end with if it ended now."""
        averaged: nn.Sequential | None = self.average and self.average.module
        return self.model if averaged is None else averaged

    def update(self, steps: int) -> None:
        """Take in the weights after the last of so many steps."""
        if self.average is not None:
            self.average.update(self.model, step=steps)

    def compare(self, lines: list[dict[str, Any]]) -> None:
        """Keep the weights of now if the last of the epochs' lines is the best so far."""
        if self.keeps_best and kept_line(lines) is lines[-1]:
            self.best = {key: value.detach().cpu().clone() for key, value in self.now.state_dict().items()}

    def finish(self) -> None:
        """Give the model the weights that the run ends with."""
        self.model.load_state_dict(self.now.state_dict() if self.best is None else self.best)

    def state_dict(self) -> dict[str, Any]:
        average = self.average and self.average.module.state_dict()
        return {"average": average, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])


def kept_line(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of the epoch whose weights are kept: the last one, or of those that certified most held-out
    images the last."""
    return max(reversed(lines), key=lambda line: line.get(HELD_OUT, {"correct": 0})["correct"])
