"""Where and how a run computes: its device, its precision, and the seeds of its random numbers."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException

from ..errors import ConfigError, MachineError, brief

# By Fabric's name of a precision: what torch.autocast casts to, None for no cast.
AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


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
    ``patience`` is how long one process waits for the others (default: torch's).

    Raises MachineError for what this machine does not have, ConfigError for what none has.
    """
    # Fabric would say which precision it uses; the manifest says that.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    options = {"accelerator": device, "precision": precision, "devices": devices, "num_nodes": nodes}
    try:
        found = Fabric(**options)  # type: ignore[arg-type]
        if found.device.type == "cpu":
            _keep_memory()
        if found.world_size > 1 and patience:
            return Fabric(**options, strategy=DDPStrategy(timeout=patience))  # type: ignore[arg-type]
        return found
    except (ValueError, RuntimeError, TypeError, ImportError, MisconfigurationException) as error:
        asked = f"device {device!r}, precision {precision!r}"
        if (devices, nodes) != (1, 1):
            asked += f", devices {devices}, nodes {nodes}"
        lacking = isinstance(error, RuntimeError | ImportError)
        raise (MachineError if lacking else ConfigError)(f"{asked}: {brief(error, 160)}") from error


def _keep_memory() -> None:
    """Let the C library keep freed memory for the next tensor; this does something only on Linux with glibc.

    By default glibc returns large blocks to the system at once and gets them again page by page, which on a
    CPU doubles the time of a training step on a batch of 64 (docs/benchmarks.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, -1)  # never give memory back
        mallopt(m_mmap_max, 0)  # and take no large block apart from the rest


def environment(fab: Fabric) -> dict[str, Any]:
    """What a manifest says about the machine: its device, processor type, instructions and threads, but no
    host name."""
    gpu = torch.cuda.get_device_name(fab.device) if fab.device.type == "cuda" else None
    return {
        "device": gpu or fab.device.type,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def default_workers(fab: Fabric) -> int:
    """How many processes load images for each process that trains: on a CPU none, for it has enough to do."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if fab.device.type != "cuda":
        return 0
    return max(1, min(8, cores // min(fab.world_size, torch.cuda.device_count())))


def precision_of(fab: Fabric) -> str:
    """Fabric's name of the precision in use, as ``--precision`` takes it."""
    return str(fab._precision.precision)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """A block that computes in this precision, as Fabric does under the same name.

    The weights stay float32; torch casts where it holds that to be safe. An autocast of the caller's around
    the block does not count, for it is in no manifest. Raises ConfigError for a precision with other weights,
    for the hash of the float32 ones is what is recorded.
    """
    if precision not in AUTOCAST:
        raise ConfigError(
            f"precision {precision!r}: expected one of {', '.join(AUTOCAST)}, which keep float32 weights"
        )
    dtype = AUTOCAST[precision]
    if dtype is None and not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def derived_seed(*parts: int) -> int:
    """A seed for one step, made from (seed, epoch, step ...).

    It depends on nothing that was drawn before, so a resumed run draws what it would have drawn.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])
