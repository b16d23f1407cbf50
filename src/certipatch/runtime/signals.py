"""What a scheduler sends before it ends a job."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Slurm sends the one that --signal names, submitit the last; where there are such.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


@contextmanager
def stopped_by(*signals: int) -> Iterator[None]:
    """A block in which these signals are as Ctrl-C."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # only there Python takes signals
        before = {one: signal.signal(one, _interrupt) for one in signals}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
