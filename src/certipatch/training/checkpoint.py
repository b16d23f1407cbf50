"""TODO."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import RecordsError
from ..records.seals import LENGTH, sha256, write_through

CHECKPOINT = "checkpoint.pt"


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if not path.exists():
        return {"epoch": 0, "step": 0, "sums": {}}
    try:
        data = path.read_bytes()
        if sha256(data[LENGTH:]).encode() != data[:LENGTH]:
            raise ValueError("it is not what was written")
        state = torch.load(io.BytesIO(data[LENGTH:]), map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise RecordsError(
            f"{path}: damaged ({' '.join(str(error).split())[:100]}); delete it to train from the start"
        ) from error
    return state


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """Replace a file in one step. Its name while it is written is always the same, so that kills leave one
    such file at most."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        for number, part in enumerate(parts):
            write_through(temporary, part, append=number > 0)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RecordsError(
            f"{path}: cannot be written ({error.strerror or error}); free some space and use --resume"
        ) from error
