"""TODO."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from .detection import FIELDS as DETECTION_FIELDS
from .findings import Verification

FIELDS = {
    "index", "name", "label", "pixels", "vanilla_label", "defended_label", "case", "certified", "failing_pair", "failing_label",
    "margin", "passes", "error",
}  # fmt: skip


EXPERIMENT = {
    "model", "weights_sha256", "trained", "masks", "fill", "data", "device", "precision", "block", "exhaustive",
}  # fmt: skip


KINDS = {"certify": (EXPERIMENT, FIELDS), "detect": (EXPERIMENT - {"exhaustive"}, DETECTION_FIELDS)}


def _manifests(folder: Path, found: Verification) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The manifests that can be read; a finished one states the lines beside it and their hash."""
    paths = sorted(
        path
        for path in folder.glob("manifest*.json")
        if re.fullmatch(r"manifest(-\d+-of-\d+)?\.json", path.name)
    )
    if not paths:
        found.add(str(folder), "has no manifest.json; give a folder that certify wrote")
    for path in paths:
        try:
            manifest = json.loads(path.read_bytes())
            kind, experiment, finished = manifest["kind"], manifest["experiment"], manifest["finished"]
            entries = json.dumps(
                {key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            found.add(path.name, f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:80]})")
            continue
        if kind not in tuple(KINDS) or manifest.get("format") != 1 or not isinstance(experiment, dict):
            found.add(
                path.name,
                f"expected format 1 of certify or detect, found {manifest.get('format')!r} of {kind!r}",
            )
            continue
        if "sha256" in manifest and manifest["sha256"] != hashlib.sha256(entries.encode()).hexdigest():
            found.add(path.name, "its sha256 is of other entries: it is not what was written")
        _check_finished(path, finished, found)
        yield path, manifest
    known = {_lines_of(path) for path in paths}
    for path in sorted(set(folder.glob("records*.jsonl")) - known):
        found.add(path.name, "has no manifest beside it")
    parts = [re.fullmatch(r"manifest-(\d+)-of-(\d+)", path.stem) for path in paths]
    for shards in {int(part[2]) for part in parts if part}:
        there = {int(part[1]) for part in parts if part and int(part[2]) == shards}
        if absent := sorted(set(range(1, min(shards, 100_000) + 1)) - there):
            found.add(
                str(folder),
                f"lacks shard {absent[0]} of {shards}"
                + (f" and {len(absent) - 1} more" if absent[1:] else ""),
            )


def _lines_of(manifest: Path) -> Path:
    return manifest.with_name(manifest.name.replace("manifest", "records", 1).replace(".json", ".jsonl"))


def _check_finished(path: Path, finished: Any, found: Verification) -> None:
    if finished is None:
        found.add(path.name, "is not finished; run certify --resume")
        return
    lines = _lines_of(path)
    data = lines.read_bytes() if lines.exists() else b""
    stated, lines_found = finished if isinstance(finished, dict) else {}, data.count(b"\n")
    if stated.get("lines") != lines_found:
        found.add(
            lines.name,
            f"expected the {stated.get('lines')!r} lines that {path.name} states, found {lines_found}",
        )
    if stated.get("sha256") != hashlib.sha256(data).hexdigest():
        found.add(
            lines.name,
            f"expected the sha256 that {path.name} states, found another: the file is not what was written",
        )


def _records(manifests: dict[Path, dict[str, Any]], found: Verification) -> dict[int, dict[str, Any]]:
    """The lines that are objects with a place of their own, by that place."""
    records: dict[int, dict[str, Any]] = {}
    _, fields = KINDS[found.kind]
    for path in map(_lines_of, manifests):
        data = path.read_bytes() if path.exists() else b""
        if not data.endswith(b"\n") and data:
            found.add(path.name, "ends in the middle of a line")
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            where = f"{path.name}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                found.add(where, "is not JSON")
                continue
            if not isinstance(record, dict) or set(record) != fields:
                odd = sorted(set(record) ^ fields) if isinstance(record, dict) else [type(record).__name__]
                found.add(
                    where,
                    f"expected the fields of a record, found other or missing ones: {', '.join(odd[:5])}",
                )
            elif type(index := record["index"]) is not int or index < 0:
                found.add(where, f"expected an index from 0 up, found {index!r}")
            elif index in records:
                found.add(where, f"image {index} occurs twice")
            else:
                records[index] = record
    return records


def _check_images(
    records: dict[int, dict[str, Any]], experiment: dict[str, Any], found: Verification
) -> None:
    """Every image of the data once, with the names and labels that the data's fingerprint is of."""
    n, path = experiment["data"]["images"], "records"
    beyond = [index for index in records if index >= n]
    absent = n - (len(records) - len(beyond))
    if absent:
        first = next(index for index in count() if index not in records)
        found.add(
            path, f"lack image {first}" + (f" and {absent - 1} more" if absent > 1 else "") + f" of {n}"
        )
    if beyond:
        found.add(path, f"hold image {min(beyond)} of only {n}")
    digest = hashlib.sha256()
    for index in sorted(records):
        digest.update(
            f"{records[index]['name']}\0{records[index]['label']}\n".encode(errors="surrogateescape")
        )
    if not absent and not beyond and digest.hexdigest() != experiment["data"]["fingerprint"]:
        found.add(path, "names or labels are not those of the data (data.fingerprint)")
