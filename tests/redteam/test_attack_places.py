"""Attacks at places that are not the attacker's choice: nothing breaks where the answer is proven,
much breaks elsewhere, and a proof that breaks stops everything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import breakable
from certipatch.certification.restore import restore
from certipatch.defenses.patchcleanser.algorithms import INFERENCES
from certipatch.errors import SoundnessError
from certipatch.geometry.places import proven_places
from certipatch.records.read import Folder, read_folder
from certipatch.redteam.attack import attack
from certipatch.redteam.climb import AttackConfig
from certipatch.redteam.places import _drawn
from certipatch.report.attack import attack_text, summarize_attack
from certipatch.report.certification import summarize
from certipatch.runtime.devices import make_fabric

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = AttackConfig(steps=8, restarts=6, certified_restarts=4)


def attacked(folder: Path, certified: Folder, opened, source, **options) -> Folder:
    fabric = make_fabric(device="cpu")
    defense = restore(certified.manifest, opened, fabric)
    attack(opened, source, defense, certified, folder, fabric=fabric, config=CONFIG, **options)
    return read_folder(folder)


@pytest.mark.parametrize("inference", INFERENCES)
def test_bounds(tmp_path: Path, inference: str):
    opened, source = breakable.certify(tmp_path / "c", inference=inference, places=True)
    certified = read_folder(tmp_path / "c")
    found = attacked(tmp_path / "a", certified, opened, source)
    for record, before in zip(found.records, certified.records, strict=True):
        (proven,) = proven_places(np.array([bit == "1" for bit in before.proven]), breakable.MASKS)
        at = record.places
        if at.top is None:
            assert at.broken != before.certified, "wrong anyway, or proven everywhere"
            assert at.proven_share == before.certified
            continue
        assert (at.height, at.width) == breakable.PATCH
        assert not proven[at.top, at.left]
        assert at.proven_share == pytest.approx(proven.mean())
        assert (at.proven_attempts > 0) == bool(proven.any() and not before.certified)
    summary = summarize_attack(found)
    assert summary["attempts_at_proven_places"] >= 20
    lower = summarize(certified).certified_share_of_places.part
    assert lower <= summary["attacked_share_of_places"]["share"] < summary["clean_accuracy"]["share"]
    assert "attacked share of places" in attack_text(summary)


def test_the_rest_of_the_attack_is_what_it_was(tmp_path: Path):
    """With and without a certificate by place; without it, records have no field of it."""
    lines = []
    for name, options in (("by-place", {"places": True}), ("plain", {})):
        opened, source = breakable.certify(tmp_path / name, n=12, **options)
        attacked(tmp_path / f"{name}-a", read_folder(tmp_path / name), opened, source)
        text = (tmp_path / f"{name}-a" / "attacks.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    assert all("places" in line for line in lines[0])
    assert [{key: line[key] for key in line if key != "places"} for line in lines[0]] == lines[1]
    summary = summarize_attack(read_folder(tmp_path / "plain-a"))
    assert not any("places" in key for key in summary)
    assert "places" not in attack_text(summary)


def test_a_false_proof_is_broken_and_stops_everything(tmp_path: Path):
    """The twin: with all rows but one said to be proven, attempts there succeed and are reported."""
    opened, source = breakable.certify(tmp_path / "c", places=True)
    certified = read_folder(tmp_path / "c")
    rows = len(breakable.MASKS)
    false = {"proven": "1" * (rows - 1) + "0", "proven_margins": (1.0,) * (rows - 1)}
    records = [
        record if record.certified else record.model_copy(update=false) for record in certified.records
    ]
    forged = Folder(certified.path, certified.manifest, records)
    with pytest.raises(SoundnessError, match="replay it from") as stopped:
        attacked(tmp_path / "a", forged, opened, source)
    folder = Path(str(stopped.value).rpartition("replay it from ")[2])
    assert {path.name for path in folder.iterdir()} == {"case.json", "clean.png", "patch.png", "patched.png"}
    case = json.loads((folder / "case.json").read_text())
    assert case["answer"] != case["record"]["label"]


def test_places_are_drawn_evenly_among_those_that_are_not_proven():
    counts, proven = np.zeros((5, 5), int), np.eye(5, dtype=bool)
    for seed in range(4000):
        shape, top, left = _drawn([proven], seed)
        assert shape == 0
        counts[top, left] += 1
    assert (counts[proven] == 0).all()
    assert counts[~proven].min() > 140
    assert counts.max() < 260
    assert _drawn([np.ones((5, 5), bool)], 0) is None
