"""Several processes of one run, on one machine or more: how they start, end together and exchange values.

With one process everything here does nothing. Fabric (or torchrun, Slurm ...) starts the processes, and
torch.distributed carries what they tell each other.
"""

from __future__ import annotations

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

from ..errors import CertiPatchError, ConfigError, ProcessError, brief
from .console import stderr
from .devices import precision_of

T = TypeVar("T")

GRACE = 3  # seconds that a process has to notice by itself that another one is gone

# The environment variable that holds, in the processes that process 0 of a machine starts, its process id.
PARENT = "CERTIPATCH_PARENT"

GONE = (
    "a process of this run has ended (killed, or out of memory?); what was written is kept: run the same "
    "command with --resume"
)


@contextmanager
def launched(fab: Fabric) -> Iterator[None]:
    """The processes of a run, from their start to their common end; with one process nothing but the block.

    Fabric starts the command once more for each further device of this machine, unless torchrun, Slurm or the
    like has started all processes. Only process 0 speaks. No process outlives another: one that waited for a
    process that is gone would wait for ever, so a thread in each watches those that it can see, and ends its
    own process.

    Raises ConfigError for devices or nodes that do not fit what was started, ProcessError on the process that
    speaks when another is gone.
    """
    _check_started(fab)
    if fab.world_size == 1:
        yield
        return
    family = _Family(fab)
    try:
        with _one_speaks(fab, family):
            _launch(fab)
            stderr.quiet = fab.global_rank > 0
            yield
            family.end(patience=10)
    finally:
        family.end()


def _check_started(fab: Fabric) -> None:
    if not torch.distributed.is_torchelastic_launched():
        return
    started = int(os.environ["WORLD_SIZE"])
    if started != fab.world_size:
        raise ConfigError(
            f"devices x nodes: expected {started}, the number of processes that torchrun started, found "
            f"{fab.world_size}"
        )


def _launch(fab: Fabric) -> None:
    os.environ[PARENT] = str(os.getpid())
    try:
        fab.launch()
    except ValueError as error:
        raise ConfigError(f"devices and nodes: {brief(error, 200)}") from error
    finally:
        del os.environ[PARENT]


@contextmanager
def _one_speaks(fab: Fabric, family: _Family) -> Iterator[None]:
    """A block whose failure is raised on one process only; on the others it ends the process in silence."""
    try:
        yield
    except (CertiPatchError, OSError):  # together() has raised the same on every process
        if fab.global_rank > 0:
            sys.exit(2)
        raise
    except KeyboardInterrupt:
        if fab.global_rank > 0:
            sys.exit(130)
        raise
    except RuntimeError as error:
        if not _of_communication(error):
            raise
        if not family.speaks():
            sys.exit(2)
        raise ProcessError(GONE) from error


def _of_communication(error: RuntimeError) -> bool:
    """Whether torch.distributed has failed, as it does when another process is gone."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


class _Family:
    """The processes of a run that one of them sees on its machine: its children, or its parent.

    A thread watches them from the start until :meth:`end`.
    """

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
        """Whether this process was started by another one of the run, and that one is gone."""
        return self.parent not in (0, os.getppid())

    def speaks(self) -> bool:
        """Whether it falls to this process to say that one is gone.

        That is the first process of the machine, or the second if the first is the one that is gone.
        """
        if self.fab.local_rank != 1:
            return self.fab.local_rank == 0
        deadline = time.monotonic() + 2  # the connections of a killed process close shortly before it is gone
        while not self.orphaned() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.orphaned()

    def end(self, patience: float = 0) -> None:
        """Stop watching; children that do not end by themselves within ``patience`` seconds are killed."""
        self.over.set()
        for child in self.adopt():
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _watch(self) -> None:
        while not self.over.wait(0.3):
            if self._someone_is_gone():
                self._leave()
                return

    def _someone_is_gone(self) -> bool:
        children = self.adopt()
        return self.orphaned() or any(child.poll() for child in children)

    def _leave(self) -> None:
        """End this process, which may wait for the one that is gone, unless it notices by itself."""
        if self.over.wait(GRACE):
            return
        if self.speaks():
            print(f"certipatch: {GONE}", file=sys.stderr, flush=True)
        self.end()
        os._exit(2)


def total(fab: Fabric, counts: dict[str, float]) -> dict[str, float]:
    """The sum of each count over the processes, on every one of them."""
    if fab.world_size == 1:
        return counts
    sums = torch.tensor(list(counts.values()), dtype=torch.float64, device=fab.device)
    torch.distributed.all_reduce(sums)
    return dict(zip(counts, sums.tolist(), strict=True))


def of_all(fab: Fabric, rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks; each process must have equally many."""
    if fab.world_size == 1:
        return rows
    found = [torch.empty_like(rows, device=fab.device) for _ in range(fab.world_size)]
    torch.distributed.all_gather(found, rows.to(fab.device))
    return torch.cat(found).to(rows.device)


@contextmanager
def together(fab: Fabric) -> Iterator[None]:
    """A block in which the processes do not communicate, and whose failure on one is raised on all.

    Otherwise the others would wait for the one that failed.
    """
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
    """The result of ``action()``, which the first process of each machine runs before the others.

    So the others find what the first one has downloaded.
    """
    result: list[T] = []
    for first in (True, False):
        with together(fab):
            if first == (fab.local_rank == 0):
                result.append(action())
    return result[0]


def alone(fab: Fabric) -> Fabric:
    """Fabric for the device of this process alone, as if there were no other process."""
    if fab.world_size == 1:
        return fab
    devices = 1 if fab.device.type == "cpu" else [fab.device.index or 0]
    options = {"accelerator": fab.device.type, "devices": devices, "precision": precision_of(fab)}
    return Fabric(**options)  # type: ignore[arg-type]
