"""The one writer of a folder: a manifest and lines that a kill, a full disk or a second writer cannot
spoil."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from ..config import differences
from ..errors import RecordsError
from .files import guard, write_atomically
from .manifest import (
    MANIFEST,
    division_of,
    network_in,
    now,
    of_shard,
    read_manifest_file,
    read_manifest_files,
    resumed,
    shard_of,
    with_worker,
)
from .read import check_written, read_lines
from .seals import LineHashes, seal, sha256, write_through

BLOCK = 32  # images that are examined together and whose records are written together


class Store:
    """The one writer of a manifest and its lines in a folder: append-only, locked, resumable.

    Use as a context manager. Each :meth:`append` is on disk when it returns; a line torn by a kill is dropped
    on resume. Raises RecordsError when the folder is of another experiment, in use, damaged or not writable.

    Args:
        lines: name of the JSON Lines file.
        shard: ``"2-of-8"`` for one of several writers that share the folder, else "" for its only one.
        resume: continue what is there.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], lines: str, *, shard: str = "", resume: bool = False
    ) -> None:
        self.folder, self.manifest, self._shard, self._resume = folder, manifest, shard, resume
        self.path = folder / of_shard(lines, shard)
        self.lines: list[dict[str, Any]] = []
        self._hashes = LineHashes(self.path)
        self._manifest_path = folder / of_shard(MANIFEST, shard)

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock_of(self._shard)
            self._lock.acquire()
        except Timeout:
            raise self._in_use() from None
        except OSError as error:
            raise RecordsError(
                f"out {self.folder}: not a folder that can be written ({error.strerror or error}); choose "
                "another --out"
            ) from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        """Continue what is there, or begin."""
        if self._manifest_path.exists():
            self._refuse_others(began=True)
            self._continue()
            return
        if self.path.exists():
            raise RecordsError(
                f"out {self.folder}: has {self.path.name} but no {self._manifest_path.name}; choose another "
                "--out"
            )
        # Written before looking at the others: of two writers who begin at once, at least one sees the other.
        self.write_manifest()
        try:
            self._refuse_others(began=False)
            guard(self.folder, self.path.touch)
        except BaseException:
            self._manifest_path.unlink()
            raise

    def _continue(self) -> None:
        """Take over the manifest and the lines of the attempt before; a line torn by a kill is dropped.

        Where something is left to do, the manifest gets an entry for this attempt.
        """
        here, self.manifest = self.manifest, read_manifest_file(self._manifest_path)
        if self.finished is None:
            self._refuse_other_network(here)
        self.lines = read_lines(self.path, repair=self.finished is None)
        check_written(self.manifest, self.path)
        if self.finished is None:
            guard(self.folder, lambda: self._hashes.cut(len(self.lines)))
            self.manifest = resumed(self.manifest, here, len(self.lines))
            self.write_manifest()
        guard(self.folder, self.path.touch)

    def _refuse_other_network(self, here: dict[str, Any]) -> None:
        """Refuse to go on with a network that is put together otherwise than the one that began.

        The batch size may be another, for what is computed stays the same.
        """
        there, found = (network_in(self.folder, manifest) for manifest in (self.manifest, here))
        for part in ("compiled", "shared_prefix"):
            if there and found and there[part] != found[part]:
                raise RecordsError(
                    f"out {self.folder}: was begun with the network's {part} {there[part]}, found "
                    f"{found[part]}; resume it as it was begun, or choose another --out"
                )

    def _refuse_others(self, *, began: bool) -> None:
        """Refuse another experiment, an earlier attempt without ``resume``, and another division of the
        images that is being written.
        """
        earlier = began
        for path, found in read_manifest_files(self.folder).items():
            self._compare(found["experiment"])
            if division_of(path) != division_of(self._manifest_path):
                earlier = True
                self._wait_for(shard_of(path))
        if earlier and not self._resume:
            raise RecordsError(
                f"out {self.folder}: holds this experiment already; continue it with --resume or choose "
                "another --out"
            )

    def _compare(self, experiment: dict[str, Any]) -> None:
        differing = differences(experiment, self.manifest["experiment"])
        if not differing:
            return
        # Other windows follow from another patch or k, and are long.
        telling = [line for line in differing if not line.startswith("masks.windows")] or differing
        raise RecordsError(
            f"out {self.folder}: holds another experiment ({'; '.join(telling[:3])}); choose another --out "
            "or the same options"
        )

    def _wait_for(self, shard: str) -> None:
        """Refuse a shard that is being written, after longer than a process needs to look and shorter than it
        needs to work."""
        try:
            with self._lock_of(shard, timeout=2):
                pass
        except Timeout:
            raise self._in_use() from None

    def _lock_of(self, shard: str, timeout: float = 0) -> FileLock:
        return FileLock(self.folder / f".lock{shard and '-'}{shard}", timeout=timeout)

    def _in_use(self) -> RecordsError:
        return RecordsError(
            f"out {self.folder}: another process is writing there; wait for it or choose another --out"
        )

    @property
    def finished(self) -> dict[str, Any] | None:
        """What was noted when the folder was complete; None while it is not."""
        found: dict[str, Any] | None = self.manifest["finished"]
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write lines and force them to disk."""
        new = list(lines)
        data = [json.dumps(line, allow_nan=False).encode() + b"\n" for line in new]

        def write() -> None:
            self._hashes.append(data)
            write_through(self.path, b"".join(data), append=True)

        guard(self.folder, write)
        self.lines += new

    def note_worker(self, environment: dict[str, Any]) -> None:
        """State the environment of a worker that has joined; a folder that is complete stays as it is."""
        if self.finished is None:
            self.manifest = with_worker(self.manifest, environment)
            self.write_manifest()

    def finish(self, **facts: Any) -> None:
        """Mark the folder as complete: number of lines and their hash, besides ``facts``; once is enough.

        Raises RecordsError if the lines are not those that were written.
        """
        if self.finished is not None and self.finished["lines"] == len(self.lines):
            return
        check_written(self.manifest, self.path)
        finished = {"at": now(), "lines": len(self.lines), "sha256": sha256(self.path.read_bytes()), **facts}
        self.manifest = {**self.manifest, "finished": finished}
        self.write_manifest()

    def write_manifest(self) -> None:
        """Write the manifest with its seal."""
        data = json.dumps(seal(self.manifest), indent=2).encode() + b"\n"
        write_atomically(self._manifest_path, data, alone=True)
