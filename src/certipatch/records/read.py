"""Reading a folder of records, each file once, and refusing what is not what was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from ..config import parse_json
from ..errors import RecordsError, brief
from .files import guard
from .manifest import MANIFEST, Manifest, first_problem, of_shard, read_manifest, read_manifest_file, shard_of
from .schema import ATTACKS, RECORDS, SCHEMAS, AttackRecord, Indexed, Record
from .seals import LineHashes, sha256

R = TypeVar("R", bound=Indexed)


@dataclass(frozen=True)
class Folder(Generic[R]):
    """A folder of records, read once and handed on: its manifest, and its records in the order of their
    index."""

    path: Path
    manifest: Manifest
    records: list[R]


def read_folder(path: Path, manifest: Manifest | None = None) -> Folder[Any]:
    """What ``certify``, ``detect`` or ``attack`` has written into a folder, of all its shards.

    Args:
        manifest: that of the folder, where it has been read already.

    Raises RecordsError for a damaged or changed line, an image that occurs twice, lines without their
    manifest, or a folder without records of images.
    """
    manifest = manifest or read_manifest(path)
    if manifest.kind == "attack":
        return Folder(path, manifest, _records(manifest, ATTACKS, AttackRecord))
    if manifest.kind not in ("certify", "detect"):
        raise RecordsError(
            f"{path}: expected records of certify, detect or attack, found a folder of "
            f"{manifest.kind}; run certify on it first"
        )
    return Folder(path, manifest, _records(manifest, RECORDS, SCHEMAS.get(manifest.defense, Record)))


def has_records(path: Path) -> bool:
    """Whether a folder of ``certify`` or ``detect`` has a record of any image."""
    stem, _, ending = RECORDS.partition(".")
    return any(file.stat().st_size for file in path.glob(f"{stem}*.{ending}"))


def read_records(path: Path) -> list[Any]:
    """The records of a folder alone, as :func:`read_folder` gives them."""
    return read_folder(path).records


def _records(manifest: Manifest, name: str, schema: type[R]) -> list[R]:
    """All lines of the files ``name`` of a folder, as records by their index."""
    files = {manifest.folder / of_shard(name, shard_of(path)): one for path, one in manifest.files.items()}
    stem, _, ending = name.partition(".")
    for path in sorted(set(manifest.folder.glob(f"{stem}*.{ending}")) - set(files)):
        raise RecordsError(f"{path}: expected its manifest beside it, found none; copy both or remove it")
    records: dict[int, R] = {}
    for path, stated in files.items():
        data = guard(path.parent, path.read_bytes) if path.exists() else b""
        for number, record in enumerate(_parsed(path, data, schema), start=1):
            if record.index in records:
                raise RecordsError(
                    f"{path}, line {number}: image {record.index} occurs twice; keep one of the lines"
                )
            records[record.index] = record
        check_written(stated, path, data)
    return [records[index] for index in sorted(records)]


def _parsed(path: Path, data: bytes, schema: type[R]) -> Iterator[R]:
    """Each complete line as a record of this schema."""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            parse_json(line)
            record = schema.model_validate_json(line, strict=True)
        except ValidationError as error:
            raise RecordsError(f"{path}, line {number}: {first_problem(error)}") from error
        except (ValueError, RecursionError) as error:
            raise _damaged(path, number, error) from error
        yield record


def _damaged(path: Path, number: int, error: Exception) -> RecordsError:
    return RecordsError(
        f"{path}, line {number}: damaged ({brief(error, 80)}); restore the file or start again in another "
        "folder"
    )


def read_lines(path: Path, *, repair: bool = False) -> list[dict[str, Any]]:
    """The complete lines of a JSON Lines file; with ``repair`` a last line without its end is cut off the
    file.

    Raises RecordsError naming the first line that is damaged.
    """
    if not path.exists():
        return []
    data = guard(path.parent, path.read_bytes)
    complete = data.rfind(b"\n") + 1
    if repair and complete < len(data):
        guard(path.parent, lambda: os.truncate(path, complete))
    return [
        _object(path, number, line) for number, line in enumerate(data[:complete].split(b"\n")[:-1], start=1)
    ]


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = parse_json(line)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, number, error) from error
    return value


def read_written(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of the only writer of a folder. Raises RecordsError if they are not what it wrote."""
    lines = read_lines(folder / name)
    check_written(read_manifest_file(folder / MANIFEST), folder / name)
    return lines


def check_written(manifest: dict[str, Any], lines: Path, data: bytes | None = None) -> None:
    """Refuse lines that are not those that were written.

    A writer that is finished has stated the hash of all its lines, one under way that of each.

    Args:
        data: what the file ``lines`` holds, if it has been read already.
    """
    if data is None:
        data = guard(lines.parent, lines.read_bytes) if lines.exists() else b""
    if manifest["finished"] is None:
        _check_each(lines, data)
    else:
        _check_all(manifest["finished"], lines, data)


def _check_each(lines: Path, data: bytes) -> None:
    hashes = LineHashes(lines)
    if data and not hashes.path.exists():
        raise RecordsError(
            f"{lines}: expected {hashes.path.name} with the hash of each line beside it, found none; copy "
            "both or start again"
        )
    number = guard(lines.parent, lambda: hashes.first_changed(data))
    if number is not None:
        raise RecordsError(
            f"{lines}, line {number}: is not what was written (by {hashes.path.name}); restore the file or "
            "start again in another folder"
        )


def _check_all(finished: Any, lines: Path, data: bytes) -> None:
    try:
        expected = finished["lines"], finished["sha256"]
    except (KeyError, TypeError) as error:
        raise RecordsError(
            f"{lines.parent}: its manifest lacks {error}; restore it or start again in another folder"
        ) from error
    found = (data.count(b"\n"), sha256(data))
    if found != expected or type(expected[0]) is not int:
        raise RecordsError(
            f"{lines}: is not what was written ({found[0]} lines found, {expected[0]} written); restore it "
            "or start again in another folder"
        )
