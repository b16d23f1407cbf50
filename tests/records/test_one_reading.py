"""Every reader takes a file in one sense: nothing is coerced, no key counts twice, no number is infinite.

The readers are those of records and manifests, and ``verify``'s own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from certipatch.config import differences, parse_json
from certipatch.data.source import Source
from certipatch.errors import RecordsError
from certipatch.records.manifest import read_manifest
from certipatch.records.read import read_folder
from certipatch.records.seals import seal
from certipatch.verify.check import verify
from certipatch.verify.folder import _fingerprint
from inputs import write_manifest

WRITTEN = Path(__file__).with_name("format-1")
FILES = {"certified": "records.jsonl", "detected": "records.jsonl", "attacked": "attacks.jsonl"}

# Of each type of JSON a value that some reader takes for one of another type, or that is none.
VALUES: tuple[Any, ...] = (
    *(True, False, 0, 1, 0.0, 1.0, 2.0, "", "0", "1", "1.5", "yes", "true", "null", "NaN", None),
    *([], [0, 1], [0.0, 1.0], ["0", "1"], [True, True], {}, {"a": 1}),
)
TYPES = {
    "index": int,
    "name": str,
    "label": int,
    "pixels": str | None,
    "vanilla_label": int | None,
    "defended_label": int | None,
    "case": str | None,
    "certified": bool,
    "failing_pair": list | None,
    "failing_label": int | None,
    "margin": float | int | None,
    "passes": int,
    "error": str | None,
    "agreement": float | int | None,
    "dissent": float | int | None,
    "ways": int,
    "broken": bool,
    **dict.fromkeys(("top", "left", "height", "width", "row", "target"), int | None),
    "attempts": int,
    "image": str | None,
}


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as JSON has it: true is no number."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, list):
        return isinstance(value, kind) and [type(each) for each in value] == [int, int]
    return isinstance(value, kind)


@pytest.fixture(params=FILES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN / request.param, tmp_path / request.param))


def write(folder: Path, lines: list[str]) -> None:
    """Write the lines of a finished folder as a forger would, with its hashes mended."""
    data = "".join(f"{line}\n" for line in lines).encode()
    (folder / FILES[folder.name]).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["finished"] |= {"lines": len(lines), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(folder / "manifest.json", manifest)


def refused(folder: Path) -> None:
    """Both readers refuse a folder, each in one line."""
    with pytest.raises(RecordsError) as error:
        read_folder(folder)
    assert "\n" not in str(error.value)
    assert verify(folder).findings


def test_no_field_of_a_line_is_coerced(folder: Path):
    lines = (folder / FILES[folder.name]).read_text().splitlines()
    line, tried = json.loads(lines[0]), 0
    for field in line:
        for value in VALUES:
            if not is_of(value, TYPES[field]):
                write(folder, [json.dumps({**line, field: value}), *lines[1:]])
                refused(folder)
                tried += 1
    assert tried > 100


def test_no_key_of_a_line_counts_twice(folder: Path):
    lines = (folder / FILES[folder.name]).read_text().splitlines()
    for key, value in json.loads(lines[0]).items():
        for second in (value, None):
            write(folder, [f"{lines[0][:-1]}, {json.dumps(key)}: {json.dumps(second)}}}", *lines[1:]])
            refused(folder)
            write(folder, [f"{{{json.dumps(key)}: {json.dumps(second)}, {lines[0][1:]}", *lines[1:]])
            refused(folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_no_number_is_infinite(folder: Path, number: str):
    lines = (folder / FILES[folder.name]).read_text().splitlines()
    line = json.loads(lines[0])
    for field in line:
        write(folder, [json.dumps({**line, field: "NUMBER"}).replace('"NUMBER"', number), *lines[1:]])
        refused(folder)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_only_utf_8(folder: Path, encoding: str):
    path = folder / FILES[folder.name]
    with pytest.raises(ValueError):
        parse_json(path.read_text().splitlines()[0].encode(encoding))
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_text().encode(encoding))
    refused(folder)


def at_each_place(value: Any, change: Callable[[Any], Any]) -> list[Any]:
    """A value of JSON with one of its parts changed, for each part."""
    found = [change(value)]
    if isinstance(value, dict):
        found += [{**value, key: new} for key in value for new in at_each_place(value[key], change)]
    return found


def test_a_manifest_is_of_its_types():
    """Format, experiment, and what is said of the lines; each with a value that Python holds to be equal."""
    manifest = json.loads((WRITTEN / "certified" / "manifest.json").read_text())
    assert differences(manifest, manifest) == []

    def alike(value: Any) -> Any:
        return float(value) if type(value) is int else int(value) if type(value) is bool else value

    changed = [other for other in at_each_place(manifest, alike) if json.dumps(other) != json.dumps(manifest)]
    assert len(changed) >= 6
    assert all(other == manifest and differences(other, manifest) for other in changed)


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_the_format_and_the_number_of_lines(folder: Path, value: Any):
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder / "manifest.json", {**manifest, "format": value})
    refused(folder)
    finished = {**manifest["finished"], "lines": type(value)(manifest["finished"]["lines"])}
    write_manifest(folder / "manifest.json", {**manifest, "finished": finished})
    refused(folder)


def test_no_key_of_a_manifest_counts_twice(folder: Path):
    path = folder / "manifest.json"
    text = json.dumps(seal(json.loads(path.read_text())))
    for key in ("kind", "experiment", "finished", "format"):
        path.write_text(f'{{"{key}": null, {text[1:]}')
        with pytest.raises(RecordsError, match="occurs twice"):
            read_manifest(folder)
        assert verify(folder).findings


# Names whose texts, written one behind the other, are the same.
NAMES = (
    ["a", "b\x001\nc"],
    ["a\x001\nb", "c"],
    ["a\x001\nb\x001\nc", "d"],
    ["a", "b"],
    ["a\n", "b"],
    ["a", "\nb"],
    ["a\x00", "b"],
    ["é", "b"],
    ["\udcc3\udca9", "b"],  # the bytes of é, as if they were not UTF-8
    ["\udcff", "b"],
    ['a", 1]\n["b', "c"],
    ["a\\n", "b"],
    ["a", "b", "c"],
    ["a\x001\nb\x001\nc"],
)


def fingerprint(names: list[str]) -> str:
    return Source(("x", "y"), names, [1] * len(names), lambda _: None).fingerprint()


def test_other_names_have_another_fingerprint():
    found = [fingerprint(names) for names in NAMES]
    for one, other in combinations(range(len(NAMES)), 2):
        assert found[one] != found[other], (NAMES[one], NAMES[other])
    for names, stated in zip(NAMES, found, strict=True):
        assert _fingerprint(dict(enumerate({"name": name, "label": 1} for name in names))) == stated


def test_ordinary_names_have_the_fingerprint_that_they_had():
    """Also those that are not ASCII, and those that are not UTF-8."""
    for names in (["a/1.png", "b/2.png"], ["é\u2028", "\x7f\r"], ["\udcff\udc80"]):
        before = "".join(f"{name}\x001\n" for name in names).encode(errors="surrogateescape")
        assert fingerprint(names) == hashlib.sha256(before).hexdigest()
