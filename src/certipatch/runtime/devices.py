"""Devices, precision and seeds: where a run takes place."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException

from ..errors import ConfigError

AUTOCAST = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}  # by Fabric's name of the precision


def make_fabric(
    *,
    device: str = "auto",
    precision: str = "32-true",
    devices: int | str = 1,
    nodes: int = 1,
    patience: timedelta | None = None,
) -> Fabric:
    """Lightning Fabric on ``devices`` (a number or "auto") of each of ``nodes`` machines.

    ``device`` is "auto", "cpu", "cuda" or "mps", ``precision`` Fabric's name of one. On more than one device
    each has a process of its own (DDP); ``world_size`` and ``global_rank`` say how many and which.
    ``patience`` is how long one waits for the others (default: torch's).
    """
    logging.getLogger("lightning_fabric").setLevel(
        logging.WARNING
    )  # the manifest says which precision was used
    options = {"accelerator": device, "precision": precision, "devices": devices, "num_nodes": nodes}
    try:
        found = Fabric(**options)  # type: ignore[arg-type]
        if found.device.type == "cpu":
            _keep_memory()
        if found.world_size > 1 and patience:
            return Fabric(**options, strategy=DDPStrategy(timeout=patience))  # type: ignore[arg-type]
        return found
    except (ValueError, RuntimeError, TypeError, ImportError, MisconfigurationException) as error:
        asked = f"device {device!r}, precision {precision!r}" + (
            f", devices {devices}, nodes {nodes}" if (devices, nodes) != (1, 1) else ""
        )
        raise ConfigError(f"{asked}: {' '.join(str(error).split())[:160]}") from error


def _keep_memory() -> None:
    """Let the C library keep freed memory for the next tensor, where it is glibc.

    By default it hands large blocks back at once and gets them again page by page, which on a CPU doubles the
    time of a training step on a batch of 64 (docs/benchmarks.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, -1)  # never
        mallopt(m_mmap_max, 0)


def environment(fab: Fabric) -> dict[str, Any]:
    """What a manifest says about the machine; no host name."""
    gpu = torch.cuda.get_device_name(fab.device) if fab.device.type == "cuda" else None
    return {
        "device": gpu or fab.device.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def precision_of(fab: Fabric) -> str:
    """Fabric's name of the precision in use, as --precision takes it."""
    return str(fab._precision.precision)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Reduced precision as Fabric has it under this name: float32 weights, cast where torch knows it to be
    safe.

    Raises ConfigError for a precision with other weights than those whose hash is recorded.
    """
    if precision not in AUTOCAST:
        raise ConfigError(
            f"precision {precision!r}: expected one of {', '.join(AUTOCAST)}, which keep float32 weights"
        )
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def derived_seed(*parts: int) -> int:
    """A seed for one step out of (seed, epoch, step ...), so that a resumed run draws what it would have
    drawn."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])
