"""Whether what lies on a disk is what was written there: hashes beside manifests, lines and checkpoints.

They find what disks, copies and editors do. Who means to deceive mends them too: that is for ``verify``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

LENGTH = 64  # of a sha256 in hexadecimal digits


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def write_through(path: Path, data: bytes | memoryview, *, append: bool = False) -> None:
    """Write a file, or on at its end; it is on disk when this returns."""
    with open(path, "ab" if append else "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the ``sha256`` of all its other entries, whatever their order and layout."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**rest, "sha256": sha256(json.dumps(rest, sort_keys=True).encode())}


def unseal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without its hash, if it has one. Raises ValueError if that is of other entries."""
    if "sha256" in manifest and seal(manifest)["sha256"] != manifest["sha256"]:
        raise ValueError("its sha256 is of other entries: it is not what was written")
    return {key: value for key, value in manifest.items() if key != "sha256"}


class LineHashes:
    """A file beside a JSON Lines file with the sha256 of each of its lines: ``records.jsonl`` has
    ``records.sha256``.

    The hash is on disk before the line is, so that a kill leaves no line without one.
    """

    def __init__(self, lines: Path) -> None:
        self.path = lines.with_suffix(".sha256")

    def append(self, lines: Iterable[bytes]) -> None:
        """Add the hashes of lines that are about to be written, each with its end."""
        write_through(self.path, b"".join(sha256(line).encode() + b"\n" for line in lines), append=True)

    def cut(self, lines: int) -> None:
        """Forget the hashes beyond ``lines``: their lines were not written."""
        if self.path.exists():
            os.truncate(self.path, min(lines * (LENGTH + 1), self.path.stat().st_size))

    def first_changed(self, data: bytes) -> int | None:
        """The number, from 1, of the first complete line in ``data`` that is not what was written; None if
        all are."""
        found = data.split(b"\n")[:-1]
        hashes = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        for number, (line, expected) in enumerate(zip_longest(found, hashes[: len(found)]), start=1):
            if expected is None or sha256(line + b"\n").encode() != expected:
                return number
        return None
