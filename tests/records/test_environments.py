"""What a run was computed with is written down at each start, and said where it differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from certipatch.records.manifest import begin_manifest, read_manifest
from certipatch.records.store import Store
from inputs import typed, write_manifest

NETWORK = {"batch_size": 8, "compiled": False, "shared_prefix": None, "pairs_pasted": 0}


def store(folder: Path, *, shard: str = "", resume: bool = True, **environment: object) -> Store:
    about = begin_manifest("test", {"a": 1}, **{"device": "cpu", "threads": 1} | environment)
    return Store(folder, about, "lines.jsonl", shard=shard, resume=resume)


def test_each_attempt_leaves_its_environment(tmp_path: Path):
    with store(tmp_path) as file:
        file.append([{"n": 0}, {"n": 1}])
    assert "resumed" not in read_manifest(tmp_path).written
    with store(tmp_path, threads=2) as file:
        file.append([{"n": 2}])
    with store(tmp_path, device="NVIDIA") as file:
        file.append([{"n": 3}])
        file.finish()
    with store(tmp_path, device="never used"):
        pass  # nothing is left to do
    manifest = read_manifest(tmp_path)
    assert [entry["lines"] for entry in manifest.written["resumed"]] == [2, 3]
    assert [entry["environment"]["threads"] for entry in manifest.written["resumed"]] == [2, 1]
    assert set(manifest.written["resumed"][0]) == {"at", "lines", "environment"}
    assert manifest.other_environments == ["device cpu or NVIDIA", "threads 1 or 2"]


def test_an_attempt_that_wrote_nothing_is_not_a_difference(tmp_path: Path):
    with store(tmp_path, device="left at once"):
        pass
    with store(tmp_path) as file:
        file.append([{"n": 0}])
        file.finish()
    assert read_manifest(tmp_path).other_environments == []


def test_shards_of_other_machines(tmp_path: Path):
    for shard, environment in (("1-of-2", {"network": NETWORK}), ("2-of-2", {"device": "NVIDIA"})):
        with store(tmp_path, shard=shard, **environment) as file:
            file.append([{"n": shard}])
            file.finish()
    found = read_manifest(tmp_path).other_environments
    assert "device cpu or NVIDIA" in found
    assert "batch size 8 or not stated" in found


@pytest.mark.parametrize("resumed", [None, 3, "x", [3], [{}], {"a": 1}, [{"environment": [1]}], [None, []]])
def test_a_stranger_may_have_written_anything(tmp_path: Path, resumed: object):
    with store(tmp_path) as file:
        file.append([{"n": 0}])
        file.finish()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    write_manifest(tmp_path / "manifest.json", {**manifest, "resumed": resumed})
    assert isinstance(read_manifest(tmp_path).other_environments, list)


@pytest.mark.parametrize("kind", ["certify", "detect", "attack", "train"])
def test_every_command_says_so(cli, photos: Path, trained: Path, tmp_path: Path, kind: str):
    """A run is begun, forgets that it is finished, and is resumed by another version."""
    given = typed(model=trained, data=photos)
    masks = typed(patch=8, masks_per_axis=2, limit=6)
    assert cli("certify", *given, *masks, out=tmp_path / "certified").code == 0
    options = {
        "certify": [*given, *masks],
        "detect": [*given, *masks],
        "attack": [*given, *typed(records=tmp_path / "certified", steps=1, restarts=1)],
        "train": typed(
            model="small-cnn",
            data=photos,
            val_data=photos,
            strategy="vanilla",
            patch=5,
            epochs=1,
            batch_size=8,
        ),
    }[kind]
    out = tmp_path / "out"
    done = cli(kind, *options, out=out)
    assert done.code == 0, done.err
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["environment"]["versions"]["torch"] = "1.0"
    write_manifest(out / "manifest.json", {**manifest, "finished": None})
    (lines,) = (path for path in out.glob("*.jsonl"))
    if kind != "train":  # the last image is left to do
        lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:-1]))
    done = cli(kind, *options, "--resume", out=out)
    assert done.code == 0, done.err
    (entry,) = json.loads((out / "manifest.json").read_text())["resumed"]
    assert entry["lines"] == lines.read_bytes().count(b"\n") - (kind != "train")
    assert entry["environment"]["versions"] == manifest["environment"]["versions"] | {
        "torch": entry["environment"]["versions"]["torch"]
    }
    found = read_manifest(out).other_environments
    assert [one.split()[0] for one in found] == ["torch"]
    if kind != "train":
        report = cli("report", out)
        words = "was not written in one environment, which can change rounding: torch 1.0 or"
        assert words in " ".join(report.out.split())
        assert json.loads(cli("report", out, json=True).out)[0]["environments_differ"] == found
    if kind == "certify":
        page = tmp_path / "page.html"
        assert cli("report", out, html=page).code == 0
        assert words in " ".join(page.read_text().split())
        image = next(photos.rglob("*.png"))
        predicted = cli("predict", image, model=trained, certified=out)
        assert predicted.code == 0
        assert "This runs as the first part did." in predicted.err


@pytest.mark.parametrize("part", ["compiled", "shared_prefix"])
def test_another_network_is_not_resumed(cli, photos: Path, trained: Path, tmp_path: Path, part: str):
    options = typed(model=trained, data=photos, patch=8, masks_per_axis=2, limit=3, out=tmp_path / "c")
    assert cli("certify", *options).code == 0
    path = tmp_path / "c" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["environment"]["network"][part] in (False, None)
    manifest["environment"]["network"][part] = {"compiled": True, "shared_prefix": "1"}[part]
    write_manifest(path, {**manifest, "finished": None})
    before = path.read_bytes()
    as_asked = ("--no-compile", "--no-shared-prefix", "--resume")
    done = cli("certify", *options, *as_asked)
    assert (done.code, f"was begun with the network's {part}" in done.err) == (2, True), done.err
    assert path.read_bytes() == before
    manifest["environment"]["network"] |= NETWORK  # another batch size alone is resumed, and said
    write_manifest(path, {**manifest, "finished": None})
    done = cli("certify", *options, *as_asked, "--batch-size", 2)
    assert done.code == 0, done.err
    assert json.loads(path.read_text())["resumed"][0]["environment"]["network"]["batch_size"] == 2
