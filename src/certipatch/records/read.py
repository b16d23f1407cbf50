"""TODO."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import RecordsError
from .files import _guard
from .manifest import MANIFEST, _of_shard, _read_manifest, _shard_of, first_problem, read_manifests
from .schema import ATTACKS, RECORDS, AttackRecord, R, Record
from .seals import LineHashes, sha256


def read_lines(path: Path, *, repair: bool = False) -> list[dict[str, Any]]:
    """The complete lines of a JSON Lines file; with ``repair`` a last line without its end is cut off the
    file.

    Raises RecordsError naming the first line that is damaged.
    """
    if not path.exists():
        return []
    data = _guard(path.parent, path.read_bytes)
    complete = data.rfind(b"\n") + 1
    if repair and complete < len(data):
        _guard(path.parent, lambda: os.truncate(path, complete))
    lines = []
    for number, line in enumerate(data[:complete].split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise RecordsError(
                f"{path}, line {number}: damaged ({' '.join(str(error).split())[:80]}); restore the file or "
                "start again in another folder"
            ) from error
        lines.append(value)
    return lines


def read_records(folder: Path) -> list[Record]:
    """All records of a certification, as :func:`read_images` gives them."""
    return read_images(folder, Record)


def read_images(folder: Path, kind: type[R]) -> list[R]:
    """All records of one kind, of all shards, in the order of their index.

    What was changed since it was written is refused.

    Raises RecordsError for a damaged or changed line, an image that occurs twice, or lines without their
    manifest.
    """
    manifests = read_manifests(folder)
    known = {folder / _of_shard(RECORDS, _shard_of(path)): manifest for path, manifest in manifests.items()}
    for path in folder.glob("records*.jsonl"):
        if path not in known:
            raise RecordsError(f"{path}: expected its manifest beside it, found none; copy both or remove it")
    records: dict[int, R] = {}
    for path, manifest in known.items():
        for number, line in enumerate(read_lines(path), start=1):
            try:
                record = kind.model_validate_json(json.dumps(line))
            except ValidationError as error:
                raise RecordsError(f"{path}, line {number}: {first_problem(error)}") from error
            if record.index in records:
                raise RecordsError(
                    f"{path}, line {number}: image {record.index} occurs twice; keep one of the lines"
                )
            records[record.index] = record
        _check_written(manifest, path)
    return [records[index] for index in sorted(records)]


def read_written(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of the only writer of a folder. Raises RecordsError if they are not what it wrote."""
    lines = read_lines(folder / name)
    _check_written(_read_manifest(folder / MANIFEST), folder / name)
    return lines


def _check_written(manifest: dict[str, Any], lines: Path) -> None:
    """Refuse lines that are not those that were written: a finished writer stated the hash of all, one under
    way that of each."""
    data = _guard(lines.parent, lines.read_bytes) if lines.exists() else b""
    if (finished := manifest["finished"]) is None:
        if data and not (hashes := LineHashes(lines).path).exists():
            raise RecordsError(
                f"{lines}: expected {hashes.name} with the hash of each line beside it, found none; copy "
                "both or start again"
            )
        if (number := _guard(lines.parent, lambda: LineHashes(lines).first_changed(data))) is not None:
            raise RecordsError(
                f"{lines}, line {number}: is not what was written (by {LineHashes(lines).path.name}); "
                "restore the file or start again in another folder"
            )
        return
    try:
        expected = finished["lines"], finished["sha256"]
    except (KeyError, TypeError) as error:
        raise RecordsError(
            f"{lines.parent}: its manifest lacks {error}; restore it or start again in another folder"
        ) from error
    found = (data.count(b"\n"), sha256(data))
    if found != expected:
        raise RecordsError(
            f"{lines}: is not what was written ({found[0]} lines found, {expected[0]} written); restore it "
            "or start again in another folder"
        )


def digest(records: list[Record]) -> str:
    """sha256 over records in the order of their index, in however many files they lie."""
    return hashlib.sha256("\n".join(record.model_dump_json() for record in records).encode()).hexdigest()


def read_attacks(folder: Path) -> list[AttackRecord]:
    """All records of an attack in the order of their index. Raises RecordsError for a damaged line."""
    records = {}
    for number, line in enumerate(read_written(folder, ATTACKS), start=1):
        try:
            record = AttackRecord.model_validate_json(json.dumps(line))
        except ValidationError as error:
            raise RecordsError(f"{folder / ATTACKS}, line {number}: {first_problem(error)}") from error
        if record.index in records:
            raise RecordsError(
                f"{folder / ATTACKS}, line {number}: image {record.index} occurs twice; keep one of the lines"
            )
        records[record.index] = record
    return [records[index] for index in sorted(records)]
