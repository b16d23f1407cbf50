"""A page opens every manifest and every file of records once."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inputs import typed


@pytest.fixture
def opens() -> Iterator[list[Path]]:
    """Every file that this process opens while the test runs, in whatever way Python opens it."""
    seen: list[Path] = []
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            seen.append(Path(os.fsdecode(arguments[0])))

    sys.addaudithook(hook)  # which cannot be taken away again, but falls silent
    yield seen
    watching = False


def test_a_page_opens_each_manifest_and_each_file_of_records_once(
    cli, trained: Path, photos: Path, tmp_path: Path, opens: list[Path]
):
    """The page is of a certification in two shards, a detection, and an attack on the certification."""
    certified, detected, attacked = (tmp_path / name for name in ("certified", "detected", "attacked"))
    given, masks = typed(model=trained, data=photos), typed(patch=8, masks_per_axis=2, limit=6)
    for shard in ("1/2", "2/2"):
        assert cli("certify", *given, *masks, shard=shard, out=certified).code == 0
    assert cli("detect", *given, *masks, out=detected).code == 0
    attack = cli("attack", *given, records=certified, steps=1, restarts=1, out=attacked)
    assert attack.code == 0, attack.err

    opens.clear()
    done = cli("report", certified, detected, attacked, html=tmp_path / "page.html", data=photos)
    assert (done.code, done.err) == (0, "")
    folders = (certified, detected, attacked)
    records = {path for folder in folders for path in folder.glob("*.json*")}
    assert {path.name for path in records} == {
        *("manifest-1-of-2.json", "manifest-2-of-2.json", "records-1-of-2.jsonl", "records-2-of-2.jsonl"),
        *("manifest.json", "records.jsonl", "attacks.jsonl"),
    }
    assert len(records) == 8
    assert {path: count for path, count in Counter(opens).items() if path in records} == dict.fromkeys(
        records, 1
    )


def test_what_is_counted_sees_every_way_to_open_a_file(tmp_path: Path, opens: list[Path]):
    """The twin: what reads twice is seen twice."""
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"{}\n")
    opens.clear()
    path.read_bytes()
    path.read_text()
    with open(path) as file:
        file.read()
    with path.open("rb") as file:
        file.read()
    os.close(os.open(path, os.O_RDONLY))
    assert opens == [path] * 5
