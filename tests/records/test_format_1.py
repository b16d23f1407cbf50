"""Folders of records that an earlier version wrote are read on, resumed, verified and attacked.

Those in ``format-1`` were written by the version of commit 28ffc2f, from before there were rooms, with the
weights that :func:`weights` gives in the file ``weights.safetensors``::

    given="--model small-cnn --weights weights.safetensors --data digits --device cpu"
    certipatch certify $given --patch 3 --masks-per-axis 3 --limit 6 --out certified
    certipatch detect $given --patch 3 --masks-per-axis 3 --limit 6 --out detected
    certipatch certify $given --patch 3 --masks-per-axis 3 --limit 6 --shard 1/2 --out shards
    certipatch certify $given --patch 3 --masks-per-axis 3 --limit 6 --shard 2/2 --out shards
    certipatch attack $given --records certified --steps 2 --restarts 2 --certified-restarts 1 --out attacked
    certipatch report certified detected shards attacked --json > report.json

For the shards blocks had 4 images, so that both have some.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from certipatch.models.small import SMALL_CNN, SmallCNN
from certipatch.records.manifest import MANIFEST, read_manifest_file
from certipatch.records.read import read_folder
from certipatch.records.schema import RECORDS, AttackRecord, DetectionRecord, PatchCleanserRecord
from inputs import typed, write_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

WRITTEN = Path(__file__).with_name("format-1")
CERTIFICATIONS = ("certified", "detected", "shards")


def weights() -> dict[str, torch.Tensor]:
    """Weights of small-cnn that look random and are the same on every machine: each is a fraction of a few
    bits, computed from whole numbers."""
    state = SmallCNN(10).state_dict()
    for number, (name, value) in enumerate(state.items()):
        if value.ndim > 1:
            n = torch.arange(value.numel(), dtype=torch.int64) + (51_000 + number) * 1_000_003
            n = n * 2_654_435_761 % 2**32
            n = (n ^ n >> 15) * 2_246_822_519 % 2**32
            scale = 2.0 ** -round(torch.tensor(float(value[0].numel())).log2().item() / 2)
            state[name] = (((n ^ n >> 13) % 2049 - 1024).float() / 512 * scale).view(value.shape)
    state["13.bias"] = torch.zeros(10)
    return state


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The model and the data of the folders, as they are typed."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    safetensors.torch.save_file(weights(), path)
    return typed(model=SMALL_CNN, weights=path, data="digits", device="cpu")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, in the current folder."""
    monkeypatch.chdir(shutil.copytree(WRITTEN, tmp_path / "format-1"))
    return tmp_path / "format-1"


def contents(folder: Path) -> dict[Path, bytes]:
    """All that was written into a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.stat().st_size}


@pytest.mark.parametrize(
    ("name", "kind", "schema"),
    [
        ("certified", "certify", PatchCleanserRecord),
        ("detected", "detect", DetectionRecord),
        ("shards", "certify", PatchCleanserRecord),
        ("attacked", "attack", AttackRecord),
    ],
)
def test_each_line_is_a_record_with_the_same_text(name: str, kind: str, schema: type):
    folder = read_folder(WRITTEN / name)
    assert folder.manifest.kind == kind
    assert folder.manifest.finished is not None
    assert [record.index for record in folder.records] == list(range(6))
    assert {type(record) for record in folder.records} == {schema}
    files = sorted((WRITTEN / name).glob("*.jsonl"))
    lines = [line for path in files for line in path.read_text().splitlines()]
    assert [json.dumps(record.model_dump(mode="json")) for record in folder.records] == lines


def test_both_parts_of_the_shards_have_images():
    assert {path.name: path.read_bytes().count(b"\n") for path in (WRITTEN / "shards").glob("*.jsonl")} == {
        "records-1-of-2.jsonl": 4,
        "records-2-of-2.jsonl": 2,
    }


def test_a_folder_that_names_no_defense_is_of_patchcleanser():
    for name in ("certified", "shards"):
        manifest = read_folder(WRITTEN / name).manifest
        assert "defense" not in manifest.stated
        assert manifest.defense == manifest.certification.defense == "patchcleanser"
    assert read_folder(WRITTEN / "detected").manifest.defense == "minority-reports"


def test_report_says_what_it_said(cli, written: Path):
    done = cli("report", *CERTIFICATIONS, "attacked", json=True)
    assert (done.code, done.err) == (0, "")
    found, expected = json.loads(done.out), json.loads((written / "report.json").read_text())
    for one, before in zip(found, expected, strict=True):
        if "min_margin" in before:  # by default all certificates counted; of these none is near to rounding
            assert (before.pop("min_margin"), one.pop("min_margin")) == (0.0, 1e-3)
            assert one.pop("below_min_margin") == 0
    assert found == expected


def test_a_page_has_their_pictures(cli, written: Path):
    done = cli("report", *CERTIFICATIONS, "attacked", html="page.html")
    assert (done.code, done.err) == (0, "")
    page = (written / "page.html").read_text()
    assert all(record.pixels in page for record in read_folder(written / "certified").records)


@pytest.mark.parametrize("name", CERTIFICATIONS)
def test_verify_finds_nothing_wrong(cli, given: list[object], written: Path, name: str):
    done = cli("verify", name)
    assert (done.code, done.err) == (0, ""), done.out
    assert "nothing wrong found" in done.out
    done = cli("verify", name, *given, "--all")
    assert done.code == 0, done.out
    assert "looked again at 6; nothing wrong found" in done.out


class TestResume:
    """What is there is continued by the very same experiment, and by no other."""

    def command(self, name: str, given: list[object], *more: object) -> list[object]:
        what = {"detected": "detect", "attacked": "attack"}.get(name, "certify")
        if what == "attack":
            options = typed(records="certified", steps=2, restarts=2, certified_restarts=1)
        else:
            options = typed(patch=3, masks_per_axis=3, limit=6)
        return [what, *given, *options, *more, "--out", name]

    @pytest.mark.parametrize("name", ["certified", "detected", "attacked"])
    def test_a_finished_folder_stays_as_it_is(self, cli, given: list[object], written: Path, name: str):
        before = contents(written / name)
        refused = cli(*self.command(name, given))
        assert (refused.code, "holds this experiment already" in refused.err) == (2, True), refused.err
        done = cli(*self.command(name, given, "--resume"))
        assert done.code == 0, done.err
        assert contents(written / name) == before

    @pytest.mark.parametrize("part", ["1/2", "2/2"])
    def test_a_finished_shard_stays_as_it_is(
        self, cli, given: list[object], written: Path, blocks_of: Callable[[int], None], part: str
    ):
        blocks_of(4)
        before = contents(written / "shards")
        done = cli(*self.command("shards", given, "--shard", part, "--resume"))
        assert done.code == 0, done.err
        assert contents(written / "shards") == before

    @pytest.mark.parametrize(
        ("name", "other", "words"),
        [
            ("certified", ["--exhaustive"], "exhaustive: False there, True here"),
            ("certified", ["--inference", "challenger"], "inference: None there, 'challenger' here"),
            ("detected", ["--limit", 5], "data.images: 6 there, 5 here"),
            ("attacked", ["--seed", 1], "attack.seed: 0 there, 1 here"),
        ],
    )
    def test_another_experiment_is_refused(
        self, cli, given: list[object], written: Path, name: str, other: list[object], words: str
    ):
        before = contents(written / name)
        refused = cli(*self.command(name, given, *other, "--resume"))
        assert (refused.code, words in refused.err) == (2, True), refused.err
        assert contents(written / name) == before

    @pytest.mark.parametrize("name", ["certified", "detected"])
    def test_a_run_under_way_is_continued(self, cli, given: list[object], written: Path, name: str):
        folder = written / name
        whole = read_folder(folder).records
        manifest = read_manifest_file(folder / MANIFEST)
        write_manifest(folder / MANIFEST, manifest | {"finished": None})
        lines = (folder / RECORDS).read_bytes().splitlines(keepends=True)
        (folder / RECORDS).write_bytes(b"".join(lines[:2]) + lines[2][:30])  # as a kill leaves it
        done = cli(*self.command(name, given, "--resume"))
        assert done.code == 0, done.err
        again = read_folder(folder)
        assert again.manifest.finished is not None
        assert (folder / RECORDS).read_bytes().splitlines(keepends=True)[:2] == lines[:2]
        for before, after in zip(whole, again.records, strict=True):
            there, here = before.model_dump(), after.model_dump()
            for number in {"margin", "agreement", "dissent"} & there.keys():
                # Another machine may round otherwise.
                assert here.pop(number) == pytest.approx(there.pop(number), abs=1e-4)
            assert here == there


def test_a_certification_is_attacked(cli, given: list[object], written: Path):
    options = typed(records="certified", steps=2, restarts=2, certified_restarts=1, out="again")
    done = cli("attack", *given, *options, json=True)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["complete"], found["certified_broken"]) == (True, 0)
    earlier, again = (read_folder(written / name).manifest.attack for name in ("attacked", "again"))
    assert earlier.records_sha256 == again.records_sha256
