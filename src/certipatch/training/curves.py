"""The curves of a training run, for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from ..errors import MachineError


class Curves:
    """Values over the steps of a training run, written into a folder; without a folder nothing is written.

    Use as a context manager. What is added is on disk after :meth:`flush`. A resumed run continues the
    curves: the values of steps that are made again are replaced.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._logger = folder and _logger(folder)  # writes nothing yet, but is refused where it cannot

    def begin(self, steps: int) -> None:
        """Continue after so many steps."""
        self._logger = self.folder and _logger(self.folder, purge_step=steps + 1)

    def add(self, group: str, step: int, **values: float) -> None:
        if self._logger:
            self._logger.log_metrics({f"{group}/{name}": value for name, value in values.items()}, step)

    def add_step(self, step: int, loss: float, lr: float, images_per_second: float) -> None:
        """Add what one step has seen; ``step`` counts from the start of the run."""
        self.add("step", step, loss=loss, lr=lr, images_per_second=images_per_second)

    def add_epoch(self, step: int, line: dict[str, Any]) -> None:
        """Add a line of ``epochs.jsonl`` at the last step of its epoch."""
        right = line["validation_vanilla"]
        self.add(
            "epoch",
            step,
            loss=line["loss"],
            lr=line["lr"],
            right_under_the_masks=line["masked_correct"] / line["masked_views"],
            validation_vanilla_accuracy=right["correct"] / right["images"],
            images_per_second=line["images"] / max(line["seconds"], 1e-3),
        )

    def flush(self) -> None:
        if self._logger:
            self._logger.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._logger:
            self._logger.finalize("")


def _logger(folder: Path, **options: Any) -> TensorBoardLogger:
    try:
        return TensorBoardLogger(folder, name="", version="", **options)
    except ModuleNotFoundError:
        raise MachineError(
            "tensorboard: expected the package, found none; pip install 'certipatch[tensorboard]'"
        ) from None
