"""Records by place: written sealed, read back, absent without ``--places``, and checked by ``verify`` with
code of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from certipatch.certification.certify import certify
from certipatch.data.load import load_source
from certipatch.defenses.patchcleanser.algorithms import INFERENCES
from certipatch.geometry.masks import MaskSet
from certipatch.geometry.places import proven_places
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
    """A certification by place, its model and its data; one image cannot be read."""
    place = tmp_path_factory.mktemp("places")
    shutil.copytree(photos, place / "photos")
    (place / "photos" / "blue" / "3.png").write_bytes(b"")
    model, source = open_run(trained), load_source(str(place / "photos"))
    fabric = make_fabric(device="cpu")
    for name, places in (("by-place", True), ("plain", False)):
        options = {"inference": request.param, "places": places}
        certify(model, source, MASKS, place / name, fabric=fabric, **options)
    return place / "by-place", model, source


def some(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of which some rows are proven and some are not."""
    return next(line for line in lines if {"0", "1"} <= set(line.get("proven") or ""))


def test_the_records_differ_in_nothing_else(given):
    """Certificates and answers are the same; a run without it has neither field; an image that cannot be read
    has none."""
    lines, plain = lines_of(given[0]), lines_of(given[0].parent / "plain")
    same = (
        "index",
        "name",
        "label",
        "pixels",
        "vanilla_label",
        "defended_label",
        "case",
        "certified",
        "error",
    )
    assert [[line[key] for key in same] for line in lines] == [[line[key] for key in same] for line in plain]
    assert not any("proven" in line or "proven_margins" in line for line in plain)
    assert all(("proven" in line) == (line["error"] is None) for line in lines)
    assert "places" not in json.loads((given[0].parent / "plain" / "manifest.json").read_text())["experiment"]
    assert [record.model_dump(mode="json") for record in read_records(given[0])] == lines
    assert some(lines)
    for line in lines:
        if line["certified"]:
            assert min(line["proven_margins"]) == pytest.approx(line["margin"], abs=1e-6)


def test_an_untouched_folder(given):
    assert findings(given[0], given) == []


def add_a_row(line: dict[str, Any]) -> None:
    at = line["proven"].index("0")
    line["proven"] = line["proven"][:at] + "1" + line["proven"][at + 1 :]
    line["proven_margins"].insert(line["proven"][:at].count("1"), 1.0)


def drop_a_row(line: dict[str, Any]) -> None:
    at = line["proven"].index("1")
    line["proven"] = line["proven"][:at] + "0" + line["proven"][at + 1 :]
    line["proven_margins"].pop(0)


TAMPERED = {
    "a row added": (add_a_row, ("is not proven", "a row of theirs is proven", "certified says otherwise")),
    "a row dropped": (drop_a_row, ("the record says it is not",)),
    "a margin raised": (lambda line: line["proven_margins"].__setitem__(0, 1e3), ("has a margin of",)),
    "a margin too few": (lambda line: line["proven_margins"].pop(), ("proven_margins are not",)),
    "a margin that is none": (
        lambda line: line["proven_margins"].__setitem__(0, -1),
        ("proven_margins are not",),
    ),
    "margins that are no list": (lambda line: line.update(proven_margins=None), ("proven_margins are not",)),
    "a mask too many": (lambda line: line.update(proven=line["proven"] + "0"), ("is not a 0 or 1",)),
    "other letters": (
        lambda line: line.update(proven=line["proven"].replace("0", "x")),
        ("is not a 0 or 1",),
    ),
    "all rows": (
        lambda line: line.update(
            proven="1" * len(line["proven"]), proven_margins=[1.0] * len(line["proven"])
        ),
        ("certified says otherwise",),
    ),
    "left out": (lambda line: (line.pop("proven"), line.pop("proven_margins")), ("is not a 0 or 1",)),
    "another answer": (
        lambda line: line.update(defended_label=(line["label"] + 1) % 3),
        ("defended_label is not the label",),
    ),
}


@pytest.mark.parametrize(("tamper", "words"), TAMPERED.values(), ids=TAMPERED)
def test_tampered_records(given, tmp_path: Path, tamper, words: tuple[str, ...]):
    """Found although the forger has mended the hashes."""
    shutil.copytree(given[0], tmp_path / "c")
    lines = lines_of(given[0])
    tamper(some(lines))
    forge(tmp_path / "c", lines)
    found = findings(tmp_path / "c", given)
    assert any(word in line for line in found for word in words), found


def test_rows_in_a_run_that_was_not_by_place(given, tmp_path: Path):
    shutil.copytree(given[0].parent / "plain", tmp_path / "c")
    lines = lines_of(tmp_path / "c")
    lines[0] |= {"proven": "1" * len(MASKS), "proven_margins": [1.0] * len(MASKS)}
    forge(tmp_path / "c", lines)
    assert any("the run was not by place" in line for line in findings(tmp_path / "c", given))


@pytest.mark.parametrize(
    "change",
    [
        {"proven": "2" * 4},
        {"proven": "1111"},
        {"proven_margins": [1.0]},
        {"proven_margins": [-1.0, 1.0]},
        {"proven_margins": None},
        {"proven": None},
        {"defended_label": 0},
        {"certified": True, "failing_pair": None, "failing_label": None},
    ],
)
def test_a_record_that_contradicts_itself_is_not_read(change):
    good = {
        "index": 0, "name": "x", "label": 1, "pixels": "00" * 32, "vanilla_label": 1, "defended_label": 1,
        "case": "agreed", "certified": False, "failing_pair": (0, 1), "failing_label": 0, "margin": 0.5,
        "passes": 11, "proven": "0011", "proven_margins": (1.0, 2.0),
    }  # fmt: skip
    PatchCleanserRecord(**good)
    with pytest.raises(ValidationError):
        PatchCleanserRecord(**{**good, **change})


def test_shares_are_means_of_the_places(given):
    """The number by brute force from the records; a demanded margin leaves out the rows that are nearer."""
    folder = read_folder(given[0])

    def share(record, margin):
        if record.error is not None:
            return 0.0
        rows, margins = np.array([bit == "1" for bit in record.proven]), iter(record.proven_margins)
        held = np.array([row and next(margins) >= margin for row in rows])
        (places,) = proven_places(held, MASKS)
        return float(places.mean())

    every = [margin for record in folder.records for margin in record.proven_margins or ()]
    for margin in (0.0, float(np.median(every)), max(every) + 1):
        found = summarize(folder, min_margin=margin).certified_share_of_places
        shares = [share(record, margin) for record in folder.records]
        assert found.part == pytest.approx(np.mean(shares))
        assert found.everywhere == sum(one == 1 for one in shares)
        assert found.somewhere == sum(one > 0 for one in shares)
        assert found.interval[0] <= found.part <= found.interval[1]
        assert found.interval[0] < found.interval[1]
    summary = summarize(folder)
    assert summary.certified_share_of_places.part >= summary.certified_robust_accuracy.part
    assert summary.certified_share_of_places.everywhere == summary.certified_robust_accuracy.count
    assert summarize(read_folder(given[0].parent / "plain")).certified_share_of_places is None


def test_command(cli, trained: Path, photos: Path, tmp_path: Path):
    """Once asked for it is part of the experiment, in the table and in JSON, and nowhere else."""
    options = typed("certify", model=trained, data=photos, limit=9, patch=16, masks_per_axis=3)
    done = cli(*options, "--places", "--out", tmp_path / "a")
    assert (done.code, "share of" in done.out) == (0, True), done.err
    done = cli(*options, "--out", tmp_path / "b")
    assert (done.code, "share of" in done.out) == (0, False)
    (one, other) = json.loads(cli("report", tmp_path / "a", tmp_path / "b", "--json").out)
    assert 0 <= one["certified_share_of_places"]["share"] <= 1
    assert "certified_share_of_places" not in other
    refused = cli(*options, "--out", tmp_path / "a", "--resume")
    assert (refused.code, "places: True there, None here" in refused.err) == (2, True)
    page = cli("report", tmp_path / "a", tmp_path / "b", html=tmp_path / "page.html")
    assert page.code == 0, page.err
    assert "Where a sticker can do nothing" in (tmp_path / "page.html").read_text()
    assert cli("report", tmp_path / "b", html=tmp_path / "b.html").code == 0
    assert 'id="h-places"' not in (tmp_path / "b.html").read_text()
