"""Challenger masking: on tables, in the schedule, around a network, on the command line, verified and
attacked.

That no attack on a certified image succeeds is in test_theorem.py, for both inferences.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import breakable
import oracle
from certipatch import MaskSet, PatchCleanser
from certipatch.certification.certify import certify
from certipatch.certification.restore import restore
from certipatch.data.load import load_source
from certipatch.defenses.patchcleanser.algorithms import answer, challenger_masking
from certipatch.defenses.patchcleanser.schedule import Schedule, missing_pairs
from certipatch.errors import ConfigError
from certipatch.models.runs import open_run
from certipatch.records.manifest import read_manifest
from certipatch.records.read import read_folder, read_records
from certipatch.redteam.attack import attack
from certipatch.redteam.climb import AttackConfig
from certipatch.report.attack import summarize_attack
from certipatch.runtime.devices import make_fabric
from certipatch.verify.algorithms import challenger_restated
from certipatch.verify.findings import Given
from inputs import typed
from networks import Views, mask_set, naive, network, pictures, true_labels
from tables import random_table, start
from tampering import findings, forge, lines_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_equals_the_oracle_and_plays_at_most_a_game_for_each_mask_but_one():
    rng, cases, longest = np.random.default_rng(0), Counter(), 0
    for _ in range(4000):
        table, games = random_table(rng, most=8), []
        found = challenger_masking(
            table.diagonal().tolist(), lambda i, j, t=table, g=games: (g.append((i, j)), t[i, j])[1]
        )
        label, case, expected = oracle.challenger_masking(table.tolist())
        assert (found, games) == ((label, case), expected)
        assert len({frozenset(game) for game in games}) == len(games) <= len(table) - 1
        longest = max(longest, len(games))
        cases[case] += 1
    assert min(cases["agreed"], cases["champion"]) >= 1000
    assert longest == 7, "the bound is reached"


@pytest.mark.parametrize(
    ("first_round", "pairs", "label"),
    [
        ([0, 1], {(0, 1): 1}, 1),  # the challenger wins
        ([0, 1], {(0, 1): 0}, 0),  # the champion wins
        ([0, 1], {(0, 1): 7}, 0),  # neither's label: the challenger is out
        (
            [0, 0, 1],
            {(0, 2): 1, (1, 2): 0},
            0,
        ),  # mask 1, not asked while it agreed, challenges the new champion
    ],
)
def test_games(first_round: list[int], pairs: dict[tuple[int, int], int], label: int):
    answered = challenger_masking(first_round, lambda i, j: pairs[min(i, j), max(i, j)])
    assert answered == (label, "champion")


def test_the_schedule_asks_for_the_games_only():
    """Several images at once, some with a label: the answers are those of the full table, the certificates
    too."""
    rng, games = np.random.default_rng(1), 0
    for _ in range(300):
        n = int(rng.integers(1, 8))
        full = [table for table in (random_table(rng, most=7) for _ in range(25)) if len(table) == n]
        for labels in ([None] * len(full), [int(table[0, 0]) for table in full]):
            schedule = Schedule(np.zeros((n, n), dtype=bool), inference="challenger")
            known, asked = [start(table) for table in full], Counter()
            for a, (table, label) in enumerate(zip(known, labels, strict=True)):
                schedule.add(a, table, label, rng.random((n, n)))
            while schedule.images:
                views, _ = schedule.next(int(rng.integers(1, 12)))
                assert views
                asked.update(view[0] for view in views)
                schedule.tell(views, [full[a][i, j] for a, i, j in views])
            for a, (table, part, label) in enumerate(zip(full, known, labels, strict=True)):
                answered, case, played = oracle.challenger_masking(table.tolist())
                assert answer(part, "challenger") == (answered, case)
                if label is None or (table.diagonal() != label).any():
                    assert asked[a] == len(played)
                    games += len(played)
                else:
                    assert (part == label).all() == oracle.certified(table.tolist(), label)
    assert games > 1000


def test_nothing_is_asked_that_is_settled():
    table = start(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 2]]))
    for label in (None, 1, 2):
        assert missing_pairs(table, label, "challenger")[0].tolist() == [[0, 2]]
    table[0, 2] = table[2, 0] = 2
    assert missing_pairs(table, None, "challenger")[0].tolist() == [[1, 2]]
    table[1, 2] = table[2, 1] = 2
    assert missing_pairs(table, None, "challenger")[0].tolist() == []
    assert answer(table, "challenger") == (2, "champion")


@pytest.mark.parametrize("exhaustive", [False, True], ids=["", "exhaustive"])
@pytest.mark.parametrize(("seed", "batch_size"), [(3, 1), (4, 7), (5, 64)])
def test_equals_one_view_at_a_time(seed: int, batch_size: int, exhaustive: bool):
    model, images, labels = network(seed), pictures(seed), true_labels(seed, 3)
    views = Views(model)
    defense = PatchCleanser(
        model, mask_set(3), batch_size=batch_size, exhaustive=exhaustive, inference="challenger"
    )
    views.forget()
    verdicts = defense.certify(images, labels)
    assert views.seen == sum(verdict.passes for verdict in verdicts)
    double = PatchCleanser(model, mask_set(3), batch_size=batch_size).certify(images, labels)
    played = 0
    for verdict, other, label, (_, table, _) in zip(
        verdicts, double, labels.tolist(), naive(seed, 3), strict=True
    ):
        answered, case, games = oracle.challenger_masking(table)
        assert (verdict.defended_label, verdict.case) == (answered, case)
        assert verdict.certified is other.certified is oracle.certified(table, label)
        assert verdict.failing_pair == other.failing_pair
        if case == "champion" and not exhaustive:
            assert verdict.passes == 1 + 9 + len(games)
            played += len(games)
    assert played or exhaustive
    before = views.seen
    assert defense.predict(images).tolist() == [verdict.defended_label for verdict in verdicts]
    if not exhaustive:
        assert views.seen - before == sum(
            10 + len(oracle.challenger_masking(table)[2]) for _, table, _ in naive(seed, 3)
        )


def test_an_unknown_inference_is_refused():
    with pytest.raises(ConfigError, match="expected one of double-masking, challenger"):
        PatchCleanser(network(3), mask_set(3), inference="majority")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def given(
    trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Given, object]:
    model, source = open_run(trained), load_source(str(photos))
    folder = tmp_path_factory.mktemp("challenger") / "c"
    masks = MaskSet.covering(image_size=model.spec.image_size, patch_size=(24, 24), masks_per_axis=3)
    certify(model, source.first(9), masks, folder, fabric=make_fabric(device="cpu"), inference="challenger")
    records = read_records(folder)
    assert {record.case for record in records} == {"agreed", "champion"}
    assert {record.certified for record in records} == {True, False}
    return folder, model, source


def test_command(cli, given, trained: Path, photos: Path, tmp_path: Path):
    """What was certified is what answers; the default is not stated, so that earlier runs go on as they
    were."""
    folder, image = given[0], photos / "red" / "0.png"
    assert read_manifest(folder).stated["inference"] == "challenger"
    options = typed("certify", model=trained, data=photos, limit=9, patch=24, masks_per_axis=3)
    for out, inference in [
        ("a", ["--inference", "challenger"]),
        ("b", ["--inference", "double-masking"]),
        ("c", []),
    ]:
        done = cli(*options, *inference, "--out", tmp_path / out)
        assert done.code == 0, done.err
        assert ("challenger masking" in done.out) == (out == "a")
    assert (tmp_path / "a" / "records.jsonl").read_bytes() == (folder / "records.jsonl").read_bytes()
    assert (tmp_path / "b" / "records.jsonl").read_bytes() == (tmp_path / "c" / "records.jsonl").read_bytes()
    assert "inference" not in read_manifest(tmp_path / "b").stated
    assert cli(*options, "--inference", "double-masking", "--out", tmp_path / "c", "--resume").code == 0
    refused = cli(*options, "--inference", "challenger", "--out", tmp_path / "c", "--resume")
    assert (refused.code, "inference: None there, 'challenger' here" in refused.err) == (2, True)
    (one, other) = json.loads(cli("report", tmp_path / "a", tmp_path / "b", "--json").out)
    assert (one["inference"], other["inference"]) == ("challenger", "double-masking")
    assert one["certified_robust_accuracy"] == other["certified_robust_accuracy"]

    said = json.loads(cli("predict", image, "--model", trained, "--certified", folder).out)
    assert said["inference"] == "challenger"
    said = json.loads(cli("predict", image, model=trained, patch=24, inference="challenger").out)
    assert said["inference"] == "challenger"
    said = json.loads(cli("predict", image, model=trained, patch=24).out)
    assert said["inference"] == "double-masking"
    refused = cli("predict", image, "--model", trained, "--certified", folder, "--inference", "challenger")
    assert (refused.code, "has its own inference" in refused.err) == (2, True)
    refused = cli(*options, "--inference", "majority", "--out", tmp_path / "d")
    assert (refused.code, "expected double-masking or challenger" in refused.err) == (2, True)


def test_an_untouched_folder_and_tampered_ones(given, tmp_path: Path):
    assert findings(given[0], given) == []
    lines = lines_of(given[0])
    champion = next(a for a, line in enumerate(lines) if line["case"] == "champion")
    line = lines[champion]
    for name, change, words in [
        ("answer", {"defended_label": (line["defended_label"] + 1) % 3}, "answers"),
        ("case", {"case": "majority"}, "case is 'majority'"),
        ("passes", {"passes": 20}, "passes 20: expected 10 to 18"),
    ]:
        shutil.copytree(given[0], tmp_path / name)
        forge(tmp_path / name, [*lines[:champion], line | change, *lines[champion + 1 :]])
        found = findings(tmp_path / name, given, sample=None if name == "answer" else 0)
        assert any(words in finding for finding in found), found
    for name, value in [("removed", None), ("default", "double-masking"), ("unknown", "x")]:
        shutil.copytree(given[0], tmp_path / name)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        manifest["experiment"].pop("inference")
        if value:
            manifest["experiment"]["inference"] = value
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        words = f"inference is {value!r}" if value else "case is 'champion'"
        assert any(words in finding for finding in findings(tmp_path / name, given, sample=0))


def test_the_restatement_agrees_with_the_oracle():
    rng = np.random.default_rng(2)
    for _ in range(1000):
        table = random_table(rng).tolist()
        first = [table[i][i] for i in range(len(table))]
        assert (
            challenger_restated(first, lambda i, j, t=table: t[i][j]) == oracle.challenger_masking(table)[:2]
        )


def test_no_certified_image_breaks_and_others_do(tmp_path: Path):
    """The attack asks the inference that was certified: each judgement is what that answers on the stored
    picture."""
    model, source = breakable.certify(tmp_path / "c", inference="challenger")
    config = AttackConfig(steps=8, restarts=6, certified_restarts=4)
    certified, fabric = read_folder(tmp_path / "c"), make_fabric(device="cpu")
    defense = restore(certified.manifest, model, fabric)
    assert defense.inference == "challenger"
    attack(model, source, defense, certified, tmp_path / "a", fabric=fabric, config=config)
    attacked = read_folder(tmp_path / "a")
    found = summarize_attack(attacked)
    assert found["certified_broken"] == 0
    assert found["certified_robust_accuracy"]["count"] >= 8
    assert found["clean_accuracy"]["count"] - found["attacked_accuracy"]["count"] >= 8, (
        "patches do break what is not certified"
    )
    defense = PatchCleanser(model.network, breakable.MASKS, inference="challenger")
    for record in attacked.records:
        if record.image:
            picture = np.array(Image.open(tmp_path / "a" / record.image))
            patched = torch.from_numpy(picture).permute(2, 0, 1)
            assert defense.predict(patched[None] / 255).item() == record.defended_label
