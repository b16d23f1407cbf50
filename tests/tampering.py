"""Folders of records as a forger leaves them, and what ``verify`` finds wrong with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from certipatch.verify.check import verify
from certipatch.verify.findings import Given
from inputs import write_manifest

Manifest = dict[str, Any]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder as JSON."""
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def forge(
    folder: Path, lines: list[dict[str, Any]], manifest: Manifest | None = None, *, reseal: bool = True
) -> None:
    """Write a folder as a forger would: with the number of lines and the hash mended."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "records.jsonl").write_bytes(data)
    manifest = manifest or json.loads((folder / "manifest.json").read_text())
    if reseal:
        manifest["finished"] |= {"lines": len(lines), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(folder / "manifest.json", manifest)


def findings(folder: Path, given: tuple[Path, Given, Any], **options: Any) -> list[str]:
    """What ``verify`` finds wrong with a folder of the model and the data in ``given``."""
    _, model, source = given
    found = verify(folder, **{"model": model, "source": source, "sample": None, "device": "cpu"} | options)
    assert all("\n" not in str(finding) for finding in found.findings)
    return list(map(str, found.findings))
