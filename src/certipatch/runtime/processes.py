"""Several processes of one run, on one machine or more: their start, their common end, and what they tell
each other.

With one process everything here does nothing. Fabric (or torchrun, Slurm ...) starts the processes;
torch.distributed carries the messages.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from lightning_fabric import Fabric

from ..errors import CertiPatchError, ConfigError, ProcessError
from .console import stderr
from .devices import precision_of

T = TypeVar("T")


GRACE = 3  # seconds


PARENT = "CERTIPATCH_PARENT"  # in the environment of the processes that process 0 of a machine starts: its id


GONE = "a process of this run has ended (killed, or out of memory?); what was written is kept: run the same command with --resume"


@contextmanager
def launched(fab: Fabric) -> Iterator[None]:
    """The processes of a run, from their start to their common end; with one process nothing but the block.

    Fabric starts the command once more for each further device of this machine, unless torchrun, Slurm or the
    like has started all processes. Only process 0 speaks. No process outlives another: who waits for one that
    is gone would wait for ever, so a thread in each looks after those it can see, and ends its own.
    """
    started = (
        int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else fab.world_size
    )
    if started != fab.world_size:
        raise ConfigError(
            f"devices x nodes: expected {started}, the number of processes that torchrun started, found "
            f"{fab.world_size}"
        )
    if fab.world_size == 1:
        yield
        return
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    beside = _Beside(fab)
    try:
        _launch(fab)
        stderr.quiet = fab.global_rank > 0
        yield
        beside.end(patience=10)
    except (CertiPatchError, OSError):
        if fab.global_rank > 0:  # as on process 0, see together()
            sys.exit(2)
        raise
    except KeyboardInterrupt:
        if fab.global_rank > 0:
            sys.exit(130)
        raise
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        if not beside.speaks():
            sys.exit(2)
        raise ProcessError(GONE) from error
    finally:
        beside.end()


def _launch(fab: Fabric) -> None:
    os.environ[PARENT] = str(os.getpid())
    try:
        fab.launch()
    except ValueError as error:
        raise ConfigError(f"devices and nodes: {' '.join(str(error).split())[:200]}") from error
    finally:
        del os.environ[PARENT]


class _Beside:
    """The processes of a run on this machine, as one of them sees them: its children, or its parent."""

    def __init__(self, fab: Fabric) -> None:
        self.fab = fab
        self.children: list[subprocess.Popen[bytes]] = []
        self.parent = int(os.environ.get(PARENT, 0))
        self.over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def adopt(self) -> list[subprocess.Popen[bytes]]:
        """The children, taken from Fabric, whose own observer would kill this process without a word."""
        found = getattr(self.fab.strategy.launcher, "procs", [])
        while found:
            self.children.append(found.pop())
        return self.children

    def orphaned(self) -> bool:
        return self.parent not in (0, os.getppid())

    def speaks(self) -> bool:
        """Whether it falls to this process to say that one is gone: to the first one of the machine, or the
        next if that is gone."""
        deadline = time.monotonic() + 2  # the connections of a killed process close shortly before it is gone
        while self.fab.local_rank == 1 and not self.orphaned() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.fab.local_rank == 0 or (self.fab.local_rank == 1 and self.orphaned())

    def end(self, patience: float = 0) -> None:
        """No more to look after: the children end by themselves within ``patience`` seconds, or are
        killed."""
        self.over.set()
        for child in self.adopt():
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _watch(self) -> None:
        while not self.over.wait(0.3):
            children = self.adopt()
            if self.orphaned() or any(child.poll() for child in children):
                if self.over.wait(GRACE):  # this process has noticed by itself
                    return
                if self.speaks():
                    print(f"certipatch: {GONE}", file=sys.stderr, flush=True)
                self.end()
                os._exit(2)


def total(fab: Fabric, counts: dict[str, float]) -> dict[str, float]:
    """Each count, summed over the processes."""
    if fab.world_size == 1:
        return counts
    sums = torch.tensor(list(counts.values()), dtype=torch.float64, device=fab.device)
    torch.distributed.all_reduce(sums)
    return dict(zip(counts, sums.tolist(), strict=True))


def of_all(fab: Fabric, rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, which have equally many, one process after the other."""
    if fab.world_size == 1:
        return rows
    found = [torch.empty_like(rows, device=fab.device) for _ in range(fab.world_size)]
    torch.distributed.all_gather(found, rows.to(fab.device))
    return torch.cat(found).to(rows.device)


@contextmanager
def together(fab: Fabric) -> Iterator[None]:
    """A block in which the processes do not communicate: what fails on one is raised on all, so that none
    waits for it."""
    if fab.world_size == 1:
        yield
        return
    failure = None
    try:
        yield
    except (CertiPatchError, OSError) as error:
        failure = error
    if total(fab, {"failed": failure is not None})["failed"]:
        failures: list[Exception | None] = [None] * fab.world_size
        torch.distributed.all_gather_object(failures, failure)
        raise next(error for error in failures if error)


def in_turn(fab: Fabric, action: Callable[[], T]) -> T:
    """``action()`` on the first process of each machine and then on the others, which so find what it has
    downloaded."""
    result: list[T] = []
    for first in (True, False):
        with together(fab):
            if first == (fab.local_rank == 0):
                result.append(action())
    return result[0]


def alone(fab: Fabric) -> Fabric:
    """Fabric for the device of this process, without the others."""
    if fab.world_size == 1:
        return fab
    devices = 1 if fab.device.type == "cpu" else [fab.device.index or 0]
    return Fabric(accelerator=fab.device.type, devices=devices, precision=precision_of(fab))  # type: ignore[arg-type]
