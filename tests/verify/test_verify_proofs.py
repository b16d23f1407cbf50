"""Records with proofs: written sealed, read back, absent without ``--prove``, counted by ``report``, and
checked by ``verify`` with code of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from certipatch.certification.certify import certify
from certipatch.data.load import load_source
from certipatch.defenses.patchcleanser.algorithms import INFERENCES
from certipatch.geometry.masks import MaskSet
from certipatch.models.runs import open_run
from certipatch.records.read import read_folder, read_records
from certipatch.records.schema import PatchCleanserRecord
from certipatch.report.certification import summarize
from certipatch.runtime.devices import make_fabric
from inputs import typed
from tampering import findings, forge, lines_of

pytestmark = pytest.mark.usefixtures("one_thread")

MASKS = MaskSet.covering(image_size=(32, 32), patch_size=(16, 16), masks_per_axis=3)


@pytest.fixture(scope="module", params=INFERENCES)
def given(request, trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A certification with proofs, its model and its data; some labels are wrong, one image cannot be
    read."""
    place = tmp_path_factory.mktemp("proofs")
    shutil.copytree(photos, place / "photos")
    (place / "photos" / "blue" / "3.png").write_bytes(b"")
    colours = sorted(path.name for path in (place / "photos").iterdir())
    for i in (0, 1):  # images in the folder of another class: answers that are proven and wrong
        first, second = (place / "photos" / colour / f"{i}.png" for colour in colours[1:3])
        data = first.read_bytes(), second.read_bytes()
        first.write_bytes(data[1])
        second.write_bytes(data[0])
    model, source = open_run(trained), load_source(str(place / "photos"))
    for name, prove in (("proofs", True), ("plain", False)):
        options = {"inference": request.param, "prove": prove}
        certify(model, source, MASKS, place / name, fabric=make_fabric(device="cpu"), **options)
    return place / "proofs", model, source


SAME = (
    "index",
    "name",
    "label",
    "pixels",
    "vanilla_label",
    "defended_label",
    "case",
    "certified",
    "failing_pair",
)


def test_the_records_differ_in_nothing_else(given):
    lines, plain = lines_of(given[0]), lines_of(given[0].parent / "plain")
    assert [[line[key] for key in SAME] for line in lines] == [[line[key] for key in SAME] for line in plain]
    assert not any("unchangeable" in line or "forgeable" in line for line in plain)
    assert all(("unchangeable" in line) == (line["error"] is None) for line in lines)
    assert "prove" not in json.loads((given[0].parent / "plain" / "manifest.json").read_text())["experiment"]
    assert [record.model_dump(mode="json") for record in read_records(given[0])] == lines
    assert any(line.get("unchangeable") and line["certified"] for line in lines)
    assert any(line.get("unchangeable") and line["defended_label"] != line["label"] for line in lines)
    assert any(line.get("unchangeable") is False for line in lines)


def test_an_untouched_folder(given):
    assert findings(given[0], given) == []


def test_shares_are_counted_from_the_lines(given):
    lines, least = lines_of(given[0]), 0.5
    proofs = summarize(read_folder(given[0]), min_margin=least).proofs
    proven = [line for line in lines if line.get("unchangeable") and line["margin"] >= least]
    wrong = [line for line in proven if line["label"] != line["defended_label"]]
    forged = [
        line
        for line in lines
        if line["error"] is None and (line["forgeable"] or (line["margin"] < least and not line["certified"]))
    ]
    assert (proofs.proven.count, proofs.wrong.count) == (len(proven), len(wrong))
    assert proofs.forgeable.count == len(forged) >= len(wrong) > 0
    assert proofs.proven.images == proofs.wrong.images == proofs.forgeable.images == len(lines)
    assert summarize(read_folder(given[0].parent / "plain")).proofs is None


def wrong_and_proven(line: dict[str, Any]) -> bool:
    return bool(line.get("unchangeable")) and line["defended_label"] != line["label"]


def open_one(line: dict[str, Any]) -> bool:
    return line.get("unchangeable") is False and line["case"] == "agreed"


TAMPERED = {
    "a proof dropped": (
        wrong_and_proven,
        {"unchangeable": False},
        "unchangeable is True, the record says False",
    ),
    "a forgery hidden": (wrong_and_proven, {"forgeable": False}, "but not forgeable"),
    "both": (
        wrong_and_proven,
        {"unchangeable": False, "forgeable": False},
        "forgeable is True, the record says False",
    ),
    "no flag": (wrong_and_proven, {"unchangeable": 1}, "are not both true or false"),
    "certificate without proof": (
        lambda line: line["certified"],
        {"unchangeable": False},
        "certified says otherwise",
    ),
    "right and forgeable": (lambda line: line["certified"], {"forgeable": True}, "but its answer is right"),
    "too few passes": (wrong_and_proven, {"passes": 10}, "passes 10"),
}


@pytest.mark.parametrize(("which", "change", "words"), TAMPERED.values(), ids=TAMPERED)
def test_tampered_records(given, tmp_path: Path, which, change, words: str):
    """Found although the forger has mended the hashes."""
    shutil.copytree(given[0], tmp_path / "c")
    lines = lines_of(given[0])
    next(line for line in lines if which(line)).update(change)
    forge(tmp_path / "c", lines)
    found = findings(tmp_path / "c", given)
    assert any(words in line for line in found), found


def test_a_proof_of_an_answer_that_is_not_proven(given, tmp_path: Path):
    """The views are looked at again: a wrong answer of which some view says otherwise is not proven."""
    shutil.copytree(given[0], tmp_path / "c")
    lines = lines_of(given[0])
    line = next(line for line in lines if line.get("unchangeable") is False)
    line.update(
        unchangeable=True, case="agreed", passes=1 + len(MASKS) * (len(MASKS) + 1) // 2, forgeable=True
    )
    line.update(failing_pair=[0, 0], failing_label=line["defended_label"])
    line["defended_label"] = (line["label"] + 1) % 3
    line["failing_label"] = line["defended_label"]
    forge(tmp_path / "c", lines)
    assert any(
        "unchangeable is False, the record says True" in found for found in findings(tmp_path / "c", given)
    )


def test_flags_in_a_run_without_proofs(given, tmp_path: Path):
    shutil.copytree(given[0].parent / "plain", tmp_path / "c")
    lines = lines_of(tmp_path / "c")
    lines[0] |= {"unchangeable": lines[0]["certified"], "forgeable": False}
    forge(tmp_path / "c", lines)
    assert any("proofs were not asked for" in line for line in findings(tmp_path / "c", given))


@pytest.mark.parametrize(
    "change",
    [
        {"unchangeable": None},
        {"forgeable": False},
        {"case": "majority"},
        {"label": 0},
        {"unchangeable": False, "certified": True, "failing_pair": None, "failing_label": None},
        {"margin": None},
    ],
)
def test_a_record_that_contradicts_itself_is_not_read(change):
    good = {
        "index": 0, "name": "x", "label": 1, "pixels": "00" * 32, "vanilla_label": 0, "defended_label": 0,
        "case": "agreed", "certified": False, "failing_pair": (0, 0), "failing_label": 0, "margin": 0.5,
        "passes": 46, "unchangeable": True, "forgeable": True,
    }  # fmt: skip
    PatchCleanserRecord(**good)
    with pytest.raises(ValidationError):
        PatchCleanserRecord(**{**good, **change})


def test_commands(cli, trained: Path, photos: Path, tmp_path: Path):
    """Once asked for it is part of the experiment, in the table, in JSON and on the page; and ``predict
    --prove`` proves what ``certify --prove`` has."""
    options = typed("certify", model=trained, data=photos, patch=16, masks_per_axis=3)
    done = cli(*options, "--prove", "--out", tmp_path / "a")
    assert (done.code, "proven without a label" in " ".join(done.out.split())) == (0, True), (
        done.err + done.out
    )
    refused = cli(*options, "--out", tmp_path / "a", "--resume")
    assert (refused.code, "prove: True there, None here" in refused.err) == (2, True)
    found = json.loads(cli("report", tmp_path / "a", "--json").out)[0]["proven_answers"]
    assert 0 < found["proven"]["count"] >= found["wrong"]["count"]
    page = cli("report", tmp_path / "a", html=tmp_path / "page.html")
    assert page.code == 0, page.err
    assert "answers proven without a label" in (tmp_path / "page.html").read_text()

    lines = lines_of(tmp_path / "a")
    images = [photos / line["name"] for line in lines]
    said = cli("predict", *images, "--prove", "--places", model=trained, certified=tmp_path / "a")
    assert said.code == 0, said.err
    answers = list(map(json.loads, said.out.splitlines()))
    assert len(answers) == len(lines)
    for line, answer in zip(lines, answers, strict=True):
        assert answer["label"] == line["defended_label"]
        assert answer["unchangeable"] == (line["unchangeable"] and line["margin"] >= answer["min_margin"])
        assert answer["statement"].startswith("Proven: " if answer["unchangeable"] else "Not proven: ")
        assert (answer["proven_share_of_places"] == 1) >= answer["unchangeable"]
    assert len({answer["unchangeable"] for answer in answers}) == 2
    refused = cli("predict", images[0], "--places", model=trained, certified=tmp_path / "a")
    assert (refused.code, "expected --prove" in refused.err) == (2, True)
