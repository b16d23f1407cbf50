"""The curves of a training run, for TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from ..errors import ConfigError, MachineError
from .counts import Step


class Curves:
    """Values over the steps of a training run, written into a folder; without a folder nothing is written.

    ``log`` says for what: a key of ``LOGGERS``.

    Use as a context manager. What is added is on disk after :meth:`flush`. A resumed run continues the
    curves: the values of steps that are made again are replaced.
    """

    def __init__(self, folder: Path | None, log: str = "tensorboard") -> None:
        self.folder, self.log = folder, log
        self._logger = folder and _logger(log, folder)  # writes nothing yet, but is refused where it cannot

    def begin(self, steps: int) -> None:
        """Continue after so many steps."""
        self._logger = self.folder and _logger(self.log, self.folder, steps)

    def add(self, group: str, step: int, **values: float) -> None:
        if self._logger:
            self._logger.log_metrics({f"{group}/{name}": value for name, value in values.items()}, step)

    def add_steps(self, before: int, steps: Sequence[Step]) -> None:
        """Add steps of an epoch that were looked at together, after so many in the epochs before."""
        pace = sum(step.images for step in steps) / max(sum(step.seconds for step in steps), 1e-9)
        for step in steps:
            number = before + step.number
            self.add("step", number, loss=step.mean_loss, lr=step.lr, images_per_second=pace)

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


def _tensorboard(folder: Path, steps: int | None) -> Logger:
    purge: dict[str, Any] = {} if steps is None else {"purge_step": steps + 1}
    return TensorBoardLogger(folder, name="", version="", **purge)


def _wandb(folder: Path, steps: int | None) -> Logger:
    """A run of Weights & Biases; its own environment variables say where to (``WANDB_MODE=offline``)."""
    from pytorch_lightning.loggers import WandbLogger

    folder.mkdir(parents=True, exist_ok=True)
    return cast(Logger, WandbLogger(project="certipatch", name=folder.parent.name, save_dir=folder))


def _mlflow(folder: Path, steps: int | None) -> Logger:
    """A run of MLflow, on the server of ``MLFLOW_TRACKING_URI`` or in a file of the folder."""
    from pytorch_lightning.loggers import MLFlowLogger

    folder.mkdir(parents=True, exist_ok=True)
    place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlflow.db"
    return cast(Logger, MLFlowLogger("certipatch", run_name=folder.parent.name, tracking_uri=place))


LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


def check_log(name: str | None) -> str | None:
    """The name of a logger. Raises ConfigError for another."""
    if name not in (None, *LOGGERS):
        raise ConfigError(f"log {name!r}: expected one of {', '.join(LOGGERS)}")
    return name


def _logger(log: str, folder: Path, steps: int | None = None) -> Logger:
    try:
        return LOGGERS[log](folder, steps)
    except ModuleNotFoundError:  # also where the library below the logger is missing
        raise MachineError(
            f"log {log}: expected its package, found none; pip install 'certipatch[{log}]'"
        ) from None
