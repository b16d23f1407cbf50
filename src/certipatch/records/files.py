"""Writing files so that a kill, a full disk or two writers leave nothing half written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import RecordsError
from .seals import write_through

T = TypeVar("T")


def write_atomically(path: Path, *parts: bytes | memoryview, alone: bool = False) -> None:
    """Replace a file by the ``parts``, one after the other, in one step: a kill leaves the old file or the
    new.

    Args:
        alone: the caller is the only writer of the folder, for it holds the folder's lock. The temporary file
            then has the same name each time, so that kills leave one such file at most.

    Raises RecordsError if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{os.getpid()}.tmp")

    def write() -> None:
        try:
            for number, part in enumerate(parts):
                write_through(temporary, part, append=number > 0)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    guard(path.parent, write)


def guard(folder: Path, action: Callable[[], T]) -> T:
    """The result of an action on files in a folder. A full disk and the like become one line that says what
    is safe."""
    try:
        return action()
    except OSError as error:
        raise RecordsError(
            f"{folder}: {error.strerror or error}; lines written before are kept, free some space and use "
            "--resume"
        ) from error
