"""Folders of records for others: what they tell about their writer, and copies that tell less."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecordsError
from .files import guard
from .manifest import Manifest, of_shard, read_manifest, shard_of
from .read import read_folder
from .schema import EPOCHS, RECORDS
from .seals import seal, sha256

LINES = {"train": EPOCHS, "certify": RECORDS, "detect": RECORDS}


@dataclass(frozen=True)
class Told:
    """What a folder tells about its writer.

    Attributes:
        commands: the command lines that wrote it; ``place``: how the data was called.
        names: the names of the images.
    """

    folder: Path
    commands: tuple[str, ...]
    place: str
    names: tuple[str, ...]


def told(folder: Path) -> Told:
    """What a folder of ``train``, ``certify`` or ``detect`` tells. Raises RecordsError for another one."""
    manifest = _finished(folder)
    environments = [one for written in manifest.files.values() for one in _environments(written)]
    commands = tuple(dict.fromkeys(str(one["command"]) for one in environments if one.get("command")))
    lines = [] if manifest.kind == "train" else read_folder(folder, manifest).records
    return Told(folder, commands, manifest.data, tuple(record.name for record in lines))


def share(folder: Path, out: Path, *, names: bool) -> None:
    """Copy manifests and lines, sealed as they are; or without names, sealed anew.

    Args:
        names: False replaces each image's name by its index, and leaves out command lines and the place of
            the data. The manifest then says so (``names``: "withheld"), and its fingerprint of the data is
            that of the new names: what is withheld cannot be compared with the data by others.

    Raises RecordsError for a folder that is not finished, or cannot be written.
    """
    manifest = _finished(folder)
    guard(out, lambda: out.mkdir(parents=True, exist_ok=True))
    print_of = (
        None if names or manifest.kind == "train" else _fingerprint(read_folder(folder, manifest).records)
    )
    for path, written in manifest.files.items():
        lines = folder / of_shard(LINES[manifest.kind], shard_of(path))
        for each in () if print_of else (lines, lines.with_suffix(".sha256")):
            if each.exists():
                shutil.copyfile(each, out / each.name)
        if names:
            shutil.copyfile(path, out / path.name)
            continue
        bare = _without_places(written)
        if print_of is not None:
            data = _without_names(lines.read_bytes())
            (out / lines.name).write_bytes(data)
            hashes = b"".join(sha256(line).encode() + b"\n" for line in data.splitlines(keepends=True))
            (out / lines.name).with_suffix(".sha256").write_bytes(hashes)
            bare["finished"] = {**bare["finished"], "sha256": sha256(data)}
            stated = bare["experiment"]
            bare["experiment"] = {**stated, "data": {**stated["data"], "fingerprint": print_of}}
        (out / path.name).write_bytes(json.dumps(seal(bare), indent=2).encode() + b"\n")


def _finished(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.kind not in LINES:
        raise RecordsError(f"{folder}: expected a folder of train, certify or detect, found {manifest.kind}")
    if manifest.finished is None:
        raise RecordsError(f"{folder}: expected a finished folder; run its command with --resume first")
    return manifest


def _environments(written: dict[str, Any]) -> list[dict[str, Any]]:
    attempts = [written, *(written.get("resumed") or [])]
    return [one["environment"] for one in attempts if isinstance(one.get("environment"), dict)]


def _without_places(written: dict[str, Any]) -> dict[str, Any]:
    """A manifest without command lines and the place of the data."""
    bare: dict[str, Any] = json.loads(json.dumps(written))
    for environment in _environments(bare):
        environment.pop("command", None)
    bare["names"] = "withheld"
    return {**bare, "data": ""}


def _without_names(data: bytes) -> bytes:
    """Lines with each image's index in place of its name."""
    lines = [json.loads(line) for line in data.splitlines()]
    return b"".join(json.dumps({**line, "name": str(line["index"])}).encode() + b"\n" for line in lines)


def _fingerprint(records: list[Any]) -> str:
    """The fingerprint of the data if its images were called by their index."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record.index}\0{record.label}\n".encode())
    return digest.hexdigest()
