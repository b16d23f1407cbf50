"""The benchmarks compare before they time, time what they say, and write what they print. No test here is
about speed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import oracle
from certipatch import PatchCleanser
from certipatch.bench.case import build_defense
from certipatch.bench.processes import in_a_process
from certipatch.bench.published import published_answer, published_loop
from certipatch.bench.rounds import interleaved as interleave
from certipatch.errors import ProcessError
from certipatch.records.read import read_records
from inputs import refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("certipatch.bench.network.LEAST_SECONDS", 0.01)


def options(model: Path, photos: Path, *more: object, **changed: object) -> list[object]:
    given = {
        "model": model,
        "data": photos,
        "patch": 5,
        "masks-per-axis": 3,
        "limit": 6,
        "repeats": 2,
        "device": "cpu",
        "batch-size": 16,
    }
    given |= {key.replace("_", "-"): value for key, value in changed.items()}
    return [
        "bench",
        *(word for key, value in given.items() if value is not None for word in (f"--{key}", value)),
        "--no-compile",
        *more,
    ]


# The published loop against the naive restatement of the paper.


@pytest.mark.parametrize("seed", range(3))
def test_published_loop_labels_every_pair(seed: int):
    size, patch, k = (12, 12), (3, 3), 3
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 5, 4)
    ).double()
    images = torch.randn(18, 3, *size, dtype=torch.float64)  # more than one batch of 16
    keeps = [torch.from_numpy(oracle.keep_of(size, mask)) for mask in oracle.covering_set(size, patch, k)[0]]
    pairs = [(i, j) for i in range(9) for j in range(i, 9)]
    table = published_loop(network, images, [keep[None, None] for keep in keeps], pairs)
    for image, found in zip(images, table, strict=True):
        views = torch.stack([image * a * b for a in keeps for b in keeps])
        assert (found.reshape(-1) == network(views).argmax(1).numpy()).all()
    assert len(np.unique(table)) > 1
    some = published_loop(network, images, [keep[None, None] for keep in keeps], pairs[::7])
    known = some >= 0
    assert known.sum() < known.size
    assert (some[known] == table[known]).all()


tables = st.integers(2, 5).flatmap(
    lambda n: st.lists(st.integers(0, 2), min_size=n * n, max_size=n * n).map(
        lambda labels: np.array(labels).reshape(n, n)
    )
)


@given(tables, st.integers(0, 2), st.sampled_from([0.0, 0.7, 1.0]))
@settings(max_examples=200, deadline=None)
def test_published_answer_is_the_papers(table: np.ndarray, label: int, agreeing: float):
    table = np.maximum(table, table.T)
    table[np.add.outer(range(len(table)), range(len(table))) < agreeing * 2 * len(table)] = (
        label  # so that all cases occur
    )
    assert published_answer(table, label) == (
        oracle.certified(table, label),
        oracle.double_masking(table.tolist())[0],
    )


# Nothing wrong is timed.


@pytest.mark.parametrize("wrong", ["certified", "defended_label"])
def test_a_wrong_answer_is_refused_before_anything_is_timed(
    cli, trained: Path, photos: Path, tmp_path: Path, monkeypatch, wrong: str
):
    honest, timed = PatchCleanser.certify, []

    def certify(self, images, labels):
        verdicts = honest(self, images, labels)
        value = not verdicts[3].certified if wrong == "certified" else verdicts[3].defended_label + 1
        return [*verdicts[:3], dataclasses.replace(verdicts[3], **{wrong: value}), *verdicts[4:]]

    monkeypatch.setattr("certipatch.bench.certification.interleaved", lambda *_: timed.append(1))
    monkeypatch.setattr(PatchCleanser, "certify", certify)
    refused(
        cli(*options(trained, photos, what="certify", out=tmp_path / "b.json")),
        "green/4.png",
        "published loop",
    )
    assert not timed
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("full", [False, True])
def test_the_loop_is_extrapolated_from_some_pairs_unless_full(
    cli, trained: Path, photos: Path, tmp_path: Path, monkeypatch, full: bool
):
    monkeypatch.setattr("certipatch.bench.certification.TIMED_PAIRS", 10)
    monkeypatch.setattr("certipatch.bench.certification.CHECKED", 2)
    asked = []

    def interleaved(repeats, loop, ours):
        loop()
        return [[3.0, 6.0], [1.0, 1.5]]

    def counting(network, images, masks, pairs):
        asked.append((len(images), len(pairs)))
        return published_loop(network, images, masks, pairs)

    monkeypatch.setattr("certipatch.bench.certification.interleaved", interleaved)
    monkeypatch.setattr("certipatch.bench.certification.published_loop", counting)
    done = cli(
        *options(trained, photos, *(["--full"] if full else []), what="certify", out=tmp_path / "b.json")
    )
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "b.json").read_text())["results"]["certify"]
    assert asked == (
        [(6, 45), (6, 45)] if full else [(2, 45), (6, 9)]
    )  # compared in full, then timed: every 5th of 45 pairs
    assert (found["compared"], found["pairs"], found["pairs_timed"]) == ((6, 45, 45) if full else (2, 45, 9))
    factor = 1 if full else 5
    assert found["rows"][0]["rounds"] == pytest.approx([3 * factor / 6, 6 * factor / 6])
    assert found["rows"][1]["ratio"]["rounds"] == pytest.approx([3 * factor, 4 * factor])
    assert found["rows"][1]["ratio"]["median"] == pytest.approx(3.5 * factor)
    assert ("extrapolated" in done.out) == (not full)


def test_differences_in_reduced_precision_are_listed_by_image(
    cli, trained: Path, photos: Path, tmp_path: Path, monkeypatch
):
    honest = build_defense

    class Rounding(PatchCleanser):
        def certify(self, images, labels):
            verdicts = super().certify(images, labels)
            return [dataclasses.replace(verdicts[0], certified=not verdicts[0].certified), *verdicts[1:]]

    def build(network, masks, how):
        defense = honest(network, masks, how)
        if how.precision == "bf16-mixed":
            defense.__class__ = Rounding
        return defense

    monkeypatch.setattr("certipatch.bench.case.build_defense", build)
    done = cli(*options(trained, photos, what="certify", precision="bf16-mixed", out=tmp_path / "b.json"))
    assert done.code == 0, done.err
    (difference,) = json.loads((tmp_path / "b.json").read_text())["results"]["certify"]["differences"]
    assert difference["image"] == "blue/0.png"
    assert difference["32-true"][0] != difference["bf16-mixed"][0]
    assert "blue/0.png" in done.out


def test_rounds_are_interleaved():
    order = []
    seconds = interleave(3, lambda: order.append("A"), lambda: order.append("B"))
    assert "".join(order) == "ABABAB"
    assert [len(of_action) for of_action in seconds] == [3, 3]


# What is written.


def test_results_say_what_was_measured_where_and_how(cli, trained: Path, photos: Path, tmp_path: Path):
    done = cli(
        *options(
            trained,
            photos,
            what="certify,network,train",
            strategies="random-both",
            train_batch_size=3,
            out=tmp_path / "b.json",
        )
    )
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "b.json").read_text())
    environment, results = found["environment"], found["results"]
    assert {"versions", "threads", "machine", "device", "cores", "load_before", "command", "commit"} <= set(
        environment
    )
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["started"][:10] <= found["finished"][:10]
    assert len(found["experiment"]["images"]) == 6
    assert found["experiment"]["masks"]["patch_size"] == [5, 5]
    assert list(results) == ["certify", "network", "train"]
    for result in results.values():
        for row in result["rows"]:
            assert row["min"] <= row["median"] <= row["max"]
            assert len(row["rounds"]) == 2
            assert row["passes_per_image"] > 0
            assert row["what"].split(",")[0] in " ".join(done.out.split())
    loop, ours = results["certify"]["rows"]
    assert (loop["passes_per_image"], loop["ratio"]) == (45, None)
    assert 9 < ours["passes_per_image"] <= 1 + 45
    vanilla, both = results["train"]["rows"]
    assert (vanilla["passes_per_image"], both["passes_per_image"]) == (3, 6)
    assert vanilla["ratio"]["rounds"] == [1, 1]
    assert both["ratio"]["rounds"] == pytest.approx(
        [b / a for a, b in zip(vanilla["rounds"], both["rounds"], strict=True)]
    )
    network = results["network"]
    alone = {int(row["what"].split()[-1]): row["median"] for row in network["rows"][:-1]}
    assert alone[network["best_batch_size"]] == min(alone.values())
    whole = network["rows"][-1]
    expected = (
        whole["rounds"][0]
        / whole["passes_per_image"]
        / network["rows"][sorted(alone).index(network["best_batch_size"])]["rounds"][0]
    )
    assert whole["ratio"]["rounds"][0] == pytest.approx(expected)


def test_memory_and_scaling_run_certify_as_typed(
    cli, trained: Path, photos: Path, tmp_path: Path, monkeypatch
):
    """The commands are run in this process, and their figures made up: five children would each load
    torch."""
    from certipatch.cli.app import app

    commands = []

    def run(command, threads=None):
        assert command[:3] == [sys.executable, "-m", "certipatch"]
        typed = dict(pairwise(command))
        commands.append((typed["--limit"], typed["--masks-per-axis"], typed.get("--devices"), threads))
        one_device = ["1" if before == "--devices" else word for before, word in pairwise(command[2:])]
        app(one_device, standalone_mode=False)
        return {None: 1.0, "1": 8.0, "2": 5.0}[typed.get("--devices")], 0.5 * len(commands)

    monkeypatch.setattr("certipatch.bench.processes.in_a_process", run)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    done = cli(*options(trained, photos, what="memory,scaling", repeats=1, out=tmp_path / "b.json"))
    assert done.code == 0, done.err
    assert commands == [
        ("1", "2", None, None),
        ("1", "3", None, None),
        ("6", "3", None, None),
        ("6", "3", "1", 4),
        ("6", "3", "2", 2),
    ]
    results = json.loads((tmp_path / "b.json").read_text())["results"]
    assert [row["rounds"] for row in results["memory"]["rows"]] == [[0.5], [1.0], [1.5]]
    assert [row["ratio"]["median"] for row in results["memory"]["rows"]] == [1, 2, 3]
    assert [row["rounds"][0] for row in results["scaling"]["rows"]] == pytest.approx([8 / 6, 5 / 6])
    assert results["scaling"]["rows"][1]["ratio"]["median"] == pytest.approx(1.6)
    assert "raise --limit" in " ".join(done.out.split())


def test_the_peak_is_that_of_the_child(tmp_path: Path):
    """This process, with torch, is larger than a bare Python that touches 100 MiB."""
    _, small = in_a_process([sys.executable, "-c", "pass"])
    _, large = in_a_process([sys.executable, "-c", "bytearray(100 * 2**20).count(1)"])
    assert 0.09 < large - small < 0.11
    _, threads = in_a_process(
        [sys.executable, "-c", "import os; assert os.environ['OMP_NUM_THREADS'] == '7'"], threads=7
    )
    assert threads < large
    with pytest.raises(ProcessError, match="code 1: KeyError"):
        in_a_process([sys.executable, "-c", "{}['missing']"])


# Images of which every pair must be computed.


def mislabelled(photos: Path, folder: Path, **shown: str) -> Path:
    """The photos with other classes' pictures in some folders, which are certified for nothing."""
    for label in ("blue", "green", "red"):
        shutil.copytree(photos / shown.get(label, label), folder / label)
    return folder


def test_only_certified_images(cli, trained: Path, photos: Path, tmp_path: Path):
    data, folder = mislabelled(photos, tmp_path / "data", green="red"), tmp_path / "certified"
    assert cli("certify", model=trained, data=data, patch=5, masks_per_axis=3, out=folder).code == 0
    certified = {record.name for record in read_records(folder) if record.certified}
    assert {name.split("/")[0] for name in certified} == {"blue", "red"}
    earlier = {"certified": folder, "patch": None, "masks_per_axis": None}
    for flags, changed in (([], earlier), (["--only-certified"], {})):
        done = cli(
            *options(
                trained, data, *flags, what="certify", limit=9, repeats=1, **changed, out=tmp_path / "b.json"
            )
        )
        assert done.code == 0, done.err
        found = json.loads((tmp_path / "b.json").read_text())
        assert len(set(found["experiment"]["images"])) == 9
        assert set(found["experiment"]["images"]) <= certified
        assert found["results"]["certify"]["certified"] == 9
        assert found["results"]["certify"]["rows"][1]["passes_per_image"] == 1 + 45


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"what": "certify,speed"}, ["what 'speed'", "certify,network,train,memory,scaling"]),
        ({"strategies": "greedy"}, ["unknown strategy 'greedy'", "greedy-multisize"]),
        ({"patch": None}, ["--patch", "--certified"]),
        ({"certified": "nowhere"}, ["--patch", "nowhere"]),
        ({"certified": "nowhere", "patch": None, "masks_per_axis": None}, ["nowhere", "manifest.json"]),
        ({"out": "missing/b.json"}, ["missing/b.json", "folder that exists"]),
        ({"precision": "half"}, ["half"]),
        ({"device": "abacus"}, ["abacus"]),
    ],
)
def test_bad_input(cli, trained: Path, photos: Path, changed: dict[str, object], words: list[str]):
    refused(cli(*options(trained, photos, **changed)), *words)


def test_no_certified_image_and_an_unreadable_one(cli, trained: Path, photos: Path, tmp_path: Path):
    wrong = mislabelled(photos, tmp_path / "wrong", blue="green", green="red", red="blue")
    refused(cli(*options(trained, wrong, "--only-certified")), "expected a certified image among 24")
    (wrong / "blue" / "0.png").write_bytes(b"not an image")
    refused(cli(*options(trained, wrong)), "blue/0.png", "cannot be read")
