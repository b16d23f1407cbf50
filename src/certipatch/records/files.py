"""TODO."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import RecordsError
from .seals import write_through

T = TypeVar("T")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step, so that a kill leaves the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def write() -> None:
        try:
            write_through(temporary, data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    _guard(path.parent, write)


def _guard(folder: Path, action: Callable[[], T]) -> T:
    """Turn a full disk and the like into one line that says what is safe."""
    try:
        return action()
    except OSError as error:
        raise RecordsError(
            f"{folder}: {error.strerror or error}; lines written before are kept, free some space and use "
            "--resume"
        ) from error
