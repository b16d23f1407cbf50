"""What ``verify`` reads in a folder: manifests and their hashes, and a line for each image of the data.

Nothing here comes from ``records``, whose files are checked by it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from ..config import parse_json
from ..errors import brief
from .findings import Experiment, Record, Verification
from .methods import KINDS
from .restatement import Restatement

Manifest = dict[str, Any]

MOST_SHARDS = 100_000  # of which absent ones are counted; a manifest is not believed more


def read_manifests(folder: Path, found: Verification) -> dict[Path, Manifest]:
    """The manifests of a folder that can be read, by path: one, or one for each shard."""
    paths = [path for path in sorted(folder.glob("manifest*.json")) if _MANIFEST.fullmatch(path.name)]
    if not paths:
        found.add(str(folder), "has no manifest.json; give a folder that certify wrote")
    read = {path: _read_manifest(path, found) for path in paths}
    known = {_lines_of(path, kind) for path in paths for kind in KINDS}
    there = {path for name in set(_LINES.values()) for path in folder.glob(f"{name}*.jsonl")}
    for path in sorted(there - known):
        found.add(path.name, "has no manifest beside it")
    _check_shards(folder, paths, found)
    return {path: manifest for path, manifest in read.items() if manifest is not None}


_LINES = {"certify": "records", "detect": "records", "attack": "attacks"}
_MANIFEST = re.compile(r"manifest(?:-(\d+)-of-(\d+))?\.json")


def _read_manifest(path: Path, found: Verification) -> Manifest | None:
    """One manifest, or None if it is damaged or of another kind.

    Its own hash is checked if it has one, and that of the lines beside it if it is finished.
    """
    try:
        manifest = parse_json(path.read_bytes())
        kind, experiment, finished = (manifest[key] for key in ("kind", "experiment", "finished"))
        rest = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found.add(path.name, f"is damaged ({type(error).__name__}: {brief(error, 80)})")
        return None
    form = manifest.get("format")
    if kind not in KINDS or form != 1 or type(form) is not int or not isinstance(experiment, dict):
        found.add(path.name, f"expected format 1 of {' or '.join(KINDS)}, found {form!r} of {kind!r}")
        return None
    if manifest.get("sha256", _sha256(rest.encode())) != _sha256(rest.encode()):
        found.add(path.name, "its sha256 is of other entries: it is not what was written")
    _check_finished(path, _lines_of(path, kind), finished, found)
    return manifest


def _check_finished(path: Path, lines: Path, finished: Any, found: Verification) -> None:
    """A finished manifest states how many lines there are beside it, and their hash."""
    if finished is None:
        found.add(path.name, "is not finished; run the command that wrote it with --resume")
        return
    data = _bytes_of(lines)
    stated, there = finished if isinstance(finished, dict) else {}, data.count(b"\n")
    if stated.get("lines") != there or type(stated.get("lines")) is not int:
        what = f"expected the {stated.get('lines')!r} lines that {path.name} states, found {there}"
        found.add(lines.name, what)
    if stated.get("sha256") != _sha256(data):
        what = f"expected the sha256 that {path.name} states, found another: the file is not what was written"
        found.add(lines.name, what)


def _check_shards(folder: Path, paths: list[Path], found: Verification) -> None:
    """Each of the shards 1 to n is there, where n is what the names of the manifests say."""
    shards: dict[int, set[int]] = {}
    for path in paths:
        part, of = _MANIFEST.fullmatch(path.name).groups()  # type: ignore[union-attr]
        if part is not None:
            shards.setdefault(int(of), set()).add(int(part))
    for n, there in shards.items():
        absent = sorted(set(range(1, min(n, MOST_SHARDS) + 1)) - there)
        if absent:
            found.add(str(folder), f"lacks shard {absent[0]} of {n}{_more(len(absent))}")


def read_records(paths: Iterable[Path], restatement: Restatement, found: Verification) -> dict[int, Record]:
    """The lines beside these manifests, by index.

    A line without the fields of a record, or with the index of an earlier one, is a finding and left out.
    """
    records: dict[int, Record] = {}
    for where, line in _lines(paths, found):
        try:
            record = parse_json(line)
        except (ValueError, RecursionError) as error:
            found.add(where, f"is not JSON that has one sense ({brief(error, 80)})")
            continue
        flaw = _flaw(record, restatement, records)
        if flaw is None:
            records[record["index"]] = record
        else:
            found.add(where, flaw)
    return records


def _lines(paths: Iterable[Path], found: Verification) -> Iterator[tuple[str, bytes]]:
    """Where each complete line beside these manifests is, and what it says."""
    for path in (_lines_of(manifest, found.kind) for manifest in paths):
        *complete, torn = _bytes_of(path).split(b"\n")
        if torn:
            found.add(path.name, "ends in the middle of a line")
        for number, line in enumerate(complete, start=1):
            yield f"{path.name}, line {number}", line


def _flaw(record: Any, restatement: Restatement, earlier: dict[int, Record]) -> str | None:
    """Why a line is left out: it lacks fields or an index, or an earlier line has its index; else None."""
    odd = restatement.odd_fields(record) if isinstance(record, dict) else [type(record).__name__]
    if odd:
        return f"expected the fields of a record, found other or missing ones: {', '.join(odd[:5])}"
    index = record["index"]
    if type(index) is not int or index < 0:
        return f"expected an index from 0 up, found {index!r}"
    return f"image {index} occurs twice" if index in earlier else None


def check_images(records: dict[int, Record], experiment: Experiment, found: Verification) -> None:
    """Every image of the data has one record, with the name and label that the data's fingerprint is of."""
    data, before = experiment["data"], len(found.findings)
    _check_complete(records, data["images"], found)
    if len(found.findings) == before and _fingerprint(records) != data["fingerprint"]:
        found.add("records", "names or labels are not those of the data (data.fingerprint)")


def _check_complete(records: dict[int, Record], n: int, found: Verification) -> None:
    """There are records of the images 0 to n - 1, and of no others."""
    beyond = [index for index in records if index >= n]
    absent = n - (len(records) - len(beyond))
    if absent:
        first = next(index for index in count() if index not in records)
        found.add("records", f"lack image {first}{_more(absent)} of {n}")
    if beyond:
        found.add("records", f"hold image {min(beyond)} of only {n}")


def _fingerprint(records: dict[int, Record]) -> str:
    """sha256 over names and labels in order, as the data has it.

    It is over lines of JSON if a name holds a separator, or half of a pair of surrogates.
    """
    pairs = [(records[index]["name"], records[index]["label"]) for index in sorted(records)]
    names = [name for name, _ in pairs]
    bare = [name.encode(errors="surrogateescape") for name in names]
    ambiguous = any("\0" in name or "\n" in name for name in names)
    if ambiguous or [data.decode(errors="surrogateescape") for data in bare] != names:
        return _sha256("".join(json.dumps(pair) + "\n" for pair in pairs).encode())
    lines = (b"%s\0%d\n" % (data, label) for data, (_, label) in zip(bare, pairs, strict=True))
    return _sha256(b"".join(lines))


def _more(n: int) -> str:
    """The rest of n things, of which the first is named."""
    return f" and {n - 1} more" if n > 1 else ""


def _lines_of(manifest: Path, kind: str) -> Path:
    """``manifest-2-of-8.json`` -> ``records-2-of-8.jsonl``; of an attack ``attacks.jsonl``."""
    return manifest.with_name(manifest.name.replace("manifest", _LINES[kind], 1).replace(".json", ".jsonl"))


def _bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
