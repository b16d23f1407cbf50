"""The file from which a killed training run continues, and the weights that take its place at the end."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ..errors import RecordsError, brief
from ..models.weights import weights_sha256
from ..records.files import write_atomically
from ..records.seals import LENGTH, sha256
from ..records.store import Store
from ..runtime.processes import together
from .counts import EpochCounts
from .depthwise import Layer
from .kept import Kept, kept_line

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_SECONDS = 300  # within an epoch; after each epoch there is one anyway


@dataclass(frozen=True)
class Start:
    """Where a run begins: at its first step, or where the checkpoint of an earlier attempt ends.

    Attributes:
        epoch, step: complete epochs, and the steps made in the next one.
        counts: what those steps have done.
        found: the windows to use again, as :class:`certipatch.training.masking.Masking` keeps them.
        float32: the layers whose gradients are computed in float32; None: not found out yet.
        lines: epochs that ``epochs.jsonl`` holds, which may be one more than are complete.
    """

    epoch: int
    step: int
    counts: EpochCounts
    found: Tensor | None
    float32: list[Layer] | None
    lines: int


class Checkpoint:
    """``checkpoint.pt`` in the folder of a run: a sha256, and after it the bytes that have it.

    Only process 0 has the store of the run, so only it reads and writes; on the others ``store`` is None.
    """

    def __init__(
        self, store: Store | None, model: nn.Sequential, optimizer: torch.optim.Optimizer, kept: Kept
    ) -> None:
        self.store, self.model, self.optimizer, self.kept = store, model, optimizer, kept
        self.float32: list[Layer] = []
        self._written = time.monotonic()

    def restore(self, fabric: Fabric) -> Start:
        """Set model and optimizer of every process to the checkpoint, if there is one.

        Raises RecordsError if it is damaged, or follows epochs whose lines are missing.
        """
        state: dict[str, Any] = {}
        with together(fabric):
            if self.store:
                state = {**self._read(self.store.folder / CHECKPOINT), "lines": len(self.store.lines)}
                if state["lines"] < state["epoch"]:
                    raise RecordsError(
                        f"{self.store.path}: expected the lines of {state['epoch']} epochs that {CHECKPOINT} "
                        f"follows, found {state['lines']}; restore it, or delete {CHECKPOINT} to train from "
                        "the start"
                    )
        state = fabric.broadcast(state)
        if not self.store and "model" in state:
            self._set(state)
        # A run that was begun before there was a choice goes on as it began.
        layers = state.get("float32", [] if "model" in state else None)
        return Start(
            epoch=state["epoch"],
            step=state["step"],
            counts=EpochCounts(**state["sums"]),
            found=state.get("found"),
            float32=None if layers is None else [Layer(*layer) for layer in layers],
            lines=state["lines"],
        )

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            return {"epoch": 0, "step": 0, "sums": {}}
        try:
            data = path.read_bytes()
            if sha256(data[LENGTH:]).encode() != data[:LENGTH]:
                raise ValueError("it is not what was written")
            state: dict[str, Any] = torch.load(
                io.BytesIO(data[LENGTH:]), map_location="cpu", weights_only=True
            )
            self._set(state)
        except Exception as error:
            raise RecordsError(
                f"{path}: damaged ({brief(error, 100)}); delete it to train from the start"
            ) from error
        return state

    def _set(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "kept" in state:  # a checkpoint from before there was a choice has the last weights alone
            self.kept.load_state_dict(state["kept"])

    @property
    def due(self) -> bool:
        """Whether the last one was written more than :data:`CHECKPOINT_SECONDS` ago."""
        return self.store is not None and time.monotonic() - self._written > CHECKPOINT_SECONDS

    def save(self, epoch: int, step: int, counts: EpochCounts, found: Tensor | None) -> None:
        """Write the state of model, optimizer and kept weights, and where the run is (see :class:`Start`)."""
        if self.store is None:
            return
        state = {
            "epoch": epoch,
            "step": step,
            "sums": vars(counts),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "kept": self.kept.state_dict(),
            "found": found,
            "float32": [tuple(layer) for layer in self.float32],
        }
        data = io.BytesIO()
        torch.save(state, data)
        content = data.getbuffer()
        write_atomically(self.store.folder / CHECKPOINT, sha256(content).encode(), content, alone=True)
        self._written = time.monotonic()

    def finish(self) -> None:
        """Write the weights of the network alone, under its own names, and remove the checkpoint."""
        if self.store is None:
            return
        self.kept.finish()
        network = {key: value.cpu().contiguous() for key, value in self.model[1].state_dict().items()}
        weights = safetensors.torch.save(network)
        write_atomically(self.store.folder / "model.safetensors", weights, alone=True)
        facts: dict[str, int] = {}
        if self.kept.keeps_best:
            facts["kept_epoch"] = kept_line(self.store.lines)["epoch"]
        if self.float32:
            facts["layers_with_float32_gradients"] = len(self.float32)
        self.store.finish(weights_sha256=weights_sha256(self.model.eval()), **facts)
        (self.store.folder / CHECKPOINT).unlink()
