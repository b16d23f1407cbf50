"""The exported predictor answers as the model does, and what differs is refused.

Its certificate is made with the exported session. Each way to be wrong that is known has a twin here: another
fill, a shifted window, another tie rule, another pixel, another answer.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

from certipatch.certification.restore import load_defense  # noqa: E402
from certipatch.deploy import deployed as of_deployed  # noqa: E402
from certipatch.deploy import export as of_export  # noqa: E402
from certipatch.deploy.bundle import runner  # noqa: E402
from certipatch.deploy.deployed import Deployed, Graph, boxes_of, start  # noqa: E402
from certipatch.deploy.graph import Views, compare, write_graph  # noqa: E402
from certipatch.errors import SoundnessError  # noqa: E402
from certipatch.records.read import read_records  # noqa: E402
from inputs import refused, write_manifest  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRY = {"patch": 16, "masks_per_axis": 3}


@pytest.fixture(scope="module")
def certified(trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from certipatch.certification.one_call import certify

    out = tmp_path_factory.mktemp("export") / "c"
    certify(trained, photos, out, patch="16", masks_per_axis=3, device="cpu", prove=True)
    return out


def export(cli, trained: Path, certified: Path, photos: Path, out: Path, **options):
    return cli("export", trained, certified=certified, data=photos, out=out, **options)


@pytest.fixture(scope="module")
def folder(trained: Path, photos: Path, certified: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployed folder. Do not write into it."""
    out = tmp_path_factory.mktemp("export") / "deployed"
    command = ["export", trained, "--certified", certified, "--data", photos, "--out", out]
    run(*command)
    return out


def run(*command: object) -> str:
    return subprocess.run(
        [sys.executable, "-m", "certipatch", *map(str, command)], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "deployed"))


def as_module(text: str, path: Path) -> ModuleType:
    """A runner as a module of its own."""
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def differences(ours: list, theirs: list) -> list[str]:
    """The images on which answer, case or certificate differ."""
    keys = ("index", "pixels", "vanilla_label", "defended_label", "case", "certified", "unchangeable")
    pairs = zip(ours, theirs, strict=True)
    return [a.name for a, b in pairs if any(getattr(a, key) != getattr(b, key) for key in keys)]


def test_the_certificate_is_the_exports_own_and_equals_the_models(folder: Path, certified: Path):
    ours, theirs = read_records(folder / "certificate"), read_records(certified)
    assert differences(ours, theirs) == []
    assert len({record.certified for record in ours}) == 2
    stated = json.loads((folder / "defended.json").read_bytes())
    experiment = json.loads((folder / "certificate" / "manifest.json").read_bytes())["experiment"]
    assert experiment["weights_sha256"] == stated["files"]["defended.onnx"]
    assert experiment["device"] == "onnxruntime-cpu"
    assert stated["compared"]["answers_differ"] == []
    assert 0 < stated["compared"]["largest_change_of_a_margin"] < 1e-4
    count = sum(record.certified for record in ours)
    assert stated["certificate"]["certified_robust_accuracy"]["count"] == count


def test_predict_says_the_same_of_both(cli, trained: Path, certified: Path, folder: Path, photos: Path):
    files, proven = sorted(photos.rglob("*.png")), Counter()
    for prove in ([], ["--prove"]):
        here = cli("predict", "--model", folder, *prove, *files).out.splitlines()
        there = cli("predict", "--model", trained, "--certified", certified, *prove, *files).out.splitlines()
        for mine, its in zip(map(json.loads, here), map(json.loads, there), strict=True):
            assert mine.keys() == its.keys()
            same = mine.keys() - {"margin", "passes"}
            assert {key: mine[key] for key in same} == {key: its[key] for key in same}
            if mine.get("unchangeable"):
                assert mine["margin"] == pytest.approx(its["margin"], abs=1e-4)
            proven[mine.get("unchangeable")] += 1
    assert min(proven[True], proven[False]) > 0


BARE = """
import runpy, sys
for name in ("torch", "torchvision", "timm", "certipatch", "pydantic", "scipy", "rich", "onnx"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bare(*words: object) -> subprocess.CompletedProcess[str]:
    """A script in a process in which neither torch nor this package can be imported."""
    command = [sys.executable, "-I", "-c", BARE, *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_runner_needs_no_torch_and_no_certipatch(cli, folder: Path, photos: Path, tmp_path: Path):
    files = sorted(photos.rglob("*.png"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    done = bare(folder / "runner.py", "--prove", *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout == cli("predict", "--model", folder, "--prove", *files).out
    done = bare(folder / "runner.py", broken)
    assert done.returncode == 2
    assert "not an image of a known format" in json.loads(done.stdout)["error"]
    known = json.loads(bare(folder / "runner.py", "--about").stdout)
    assert known["certified_robust_accuracy"]["images"] == len(files)
    assert bare(folder / "runner.py").returncode == 2


def test_no_two_files_in_the_runner_have_a_name_in_common():
    import ast

    named = Counter(
        name
        for node in ast.parse(runner()).body
        for name in ([node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else [])
    )
    assert len(named) > 50
    assert [name for name, times in named.items() if times > 1] == []
    ruff = [shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))]
    ruff += ["check", "--isolated", "--select", "F821,F823,E9", "-"]
    done = subprocess.run(ruff, input=runner(), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def oracle(first: list[int], table: np.ndarray) -> tuple[int, str]:
    """Algorithm 1 as DESIGN.md states it; ties of the majority: the smallest label."""
    counts = Counter(first)
    majority = min(label for label in counts if counts[label] == max(counts.values()))
    if len(counts) == 1:
        return majority, "agreed"
    for i, label in enumerate(first):
        if label != majority and all(table[i, j] == label for j in range(len(first))):
            return label, "disagreer"
    return majority, "majority"


class Lookup:
    """A session that reads labels from a table: the number of a mask is the top of its window."""

    def __init__(self, table: np.ndarray, classes: int) -> None:
        self.table, self.classes = table, classes

    def run(self, _, inputs):
        logits = np.zeros((len(inputs["windows"]), self.classes), np.float32)
        for row, windows in zip(logits, inputs["windows"].reshape(-1, 2, 4), strict=True):
            i, j = (int(box[0]) if box[2] > box[0] else -1 for box in windows)
            i, j = max(i, j), min(i, j)
            row[0 if i < 0 else self.table[i, j if j >= 0 else i]] = 1
        return [logits]


def wrong_answers(runner: ModuleType, worlds: int = 400) -> int:
    """Of how many random tables a runner's answer or proof is not the oracle's."""
    rng, wrong, cases = np.random.default_rng(0), 0, Counter()
    for world in range(worlds):
        masks = int(rng.integers(2, 7))
        table = rng.integers(0, 3, (masks, masks)) * (
            rng.random((masks, masks)) < (0.02, 0.3, 0.6, 1)[world % 4]
        )
        table = np.triu(table) + np.triu(table, 1).T
        windows = [[[i, 0, 1, 1]] for i in range(masks)]
        stated = {
            "windows": windows,
            "way": {"inference": "double-masking"},
            "model": {"classes": ["a", "b", "c"], "image_size": [9, 9]},
            **{
                "threat": {"patch_size": [1, 1]},
                "shown": ["a", "b", "c"],
                "least": 0.0,
            },
        }
        graph = runner.Graph(Lookup(table, 3), 3, runner.boxes_of(windows))
        verdict = runner.Deployed(stated, graph).examine(np.zeros((3, 9, 9), np.uint8), prove=True)
        expected = oracle(table.diagonal().tolist(), table)
        right = (verdict.defended_label, verdict.case) == expected
        wrong += not (right and verdict.unchangeable == bool((table == table[0, 0]).all()))
        cases[verdict.case, verdict.unchangeable] += 1
    assert min(cases.values()) > 5
    assert len(cases) == 4
    return wrong


def test_the_runners_algorithm_is_the_oracles_and_a_reversed_tie_rule_is_not(tmp_path: Path, copy: Path, cli):
    text = runner()
    assert wrong_answers(as_module(text, tmp_path / "straight.py")) == 0
    rule = "labels[counts.argmax()]"
    assert text.count(rule) == 1
    reversed_text = text.replace(rule, "labels[len(counts) - 1 - counts[::-1].argmax()]")
    assert wrong_answers(as_module(reversed_text, tmp_path / "reversed.py")) > 10
    assert cli("verify", copy).code == 0
    (copy / "runner.py").write_text(reversed_text, encoding="utf-8")
    done = cli("verify", copy)
    assert done.code == 1
    assert "runner.py: is not what was exported" in done.out


def reseal(folder: Path, **changes) -> None:
    """Change what a folder says of itself as a forger would."""
    stated = json.loads((folder / "defended.json").read_bytes())
    write_manifest(folder / "defended.json", {**stated, **changes})


def test_twin_a_window_is_shifted(copy: Path, cli, photos: Path):
    stated = json.loads((copy / "defended.json").read_bytes())
    stated["windows"][4][0][1] += 1
    (copy / "defended.json").write_text(json.dumps(stated))
    image = photos / "red" / "0.png"
    refused(cli("predict", image, model=copy), "damaged", "it is not what was written")
    reseal(copy, windows=stated["windows"])
    refused(cli("predict", image, model=copy), "every patch to be covered", "no mask covers")
    done = bare(copy / "runner.py", image)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no mask covers" in done.stderr
    done = cli("verify", copy)
    assert done.code == 1
    assert "another function than its certificate (masks.windows" in done.out


def test_twin_the_fill_is_another(copy: Path, trained: Path, certified: Path, photos: Path, cli):
    """By 1/255: the export is refused, a folder with such a graph does not start, and verify sees through one
    whose every hash and probe was forged."""
    defense = load_defense(trained, certified, device="cpu")
    model, masks, views = defense.model, defense.masks, 10
    boxes = boxes_of(masks.to_json()["windows"])
    path = copy / "defended.onnx"
    right = Views(model, defense.fill).eval()
    write_graph(model, defense.fill, masks, path, views=views, threads=1)
    assert compare(Graph(start(path, 1), views, boxes), right, masks) < 1e-4
    write_graph(model, defense.fill + 1 / 255, masks, path, views=views, threads=1)
    wrong = Graph(start(path, 1), views, boxes)
    with pytest.raises(SoundnessError, match="answers otherwise than the network"):
        compare(wrong, right, masks)

    stated = json.loads((copy / "defended.json").read_bytes())
    image = photos / "red" / "0.png"
    refused(cli("predict", image, model=copy), "not the graph that was certified")
    forged = {**stated["files"], "defended.onnx": of_export.sha256(path.read_bytes())}
    reseal(copy, files=forged, views=views)
    refused(cli("predict", image, model=copy), "margins move by", "export and certify here")
    assert "is of another function than its certificate" in cli("verify", copy).out
    labels, margins = Deployed(stated, wrong).first_round(
        of_deployed.probe_pixels((32, 32)), len(stated["probe"]["labels"])
    )
    reseal(copy, files=forged, views=views, probe={"labels": labels.tolist(), "margins": margins.tolist()})
    assert cli("predict", image, model=copy).code == 0
    manifest = copy / "certificate" / "manifest.json"
    written = json.loads(manifest.read_bytes())
    written["experiment"]["weights_sha256"] = forged["defended.onnx"]
    write_manifest(manifest, written)
    assert cli("verify", copy).code == 0
    refused(cli("verify", copy, model=copy, data=photos), "masks otherwise than is stated", "differ by")


def test_verify_looks_at_the_network_inside_the_graph(folder: Path, photos: Path, cli):
    done = cli("verify", folder, model=folder, data=photos, sample=6)
    assert done.code == 0, done.out
    assert "looked again at 6" in done.out


def test_verify_finds_a_number_that_is_not_the_records(copy: Path, cli):
    stated = json.loads((copy / "defended.json").read_bytes())
    shares = {**stated["certificate"], **stated["certificate"]["proven_answers"]}
    for name in (
        *("vanilla_accuracy", "clean_accuracy", "certified_robust_accuracy"),
        *("proven", "wrong", "forgeable"),
    ):
        for entry in ("count", "images", "share"):
            shares[name][entry] += 1
            reseal(copy, certificate=stated["certificate"])
            done = cli("verify", copy)
            assert done.code == 1
            assert f"{name} says {shares[name]['count']} of" in done.out
            shares[name][entry] -= 1
    stated["certificate"].pop("proven_answers")
    reseal(copy, certificate=stated["certificate"])
    assert "its proven_answers are not what was asked for" in cli("verify", copy).out


@pytest.mark.parametrize("least", [0, -1.0, 9e-4])
def test_verify_finds_a_least_margin_that_rounding_reaches(copy: Path, cli, least):
    """With it the runner would say "Proven" of a tie."""
    assert cli("verify", copy).code == 0
    reseal(copy, least=least)
    done = cli("verify", copy)
    assert done.code == 1
    assert f"least is {least!r}" in done.out


def test_verify_finds_a_runner_that_is_not_ours(copy: Path, cli):
    """Its hash is forged too; one of another version cannot be told."""
    stated = json.loads((copy / "defended.json").read_bytes())
    text = (copy / "runner.py").read_text().replace('proof == "unchangeable"', "True")
    (copy / "runner.py").write_text(text)
    reseal(copy, files={**stated["files"], "runner.py": of_export.sha256(text.encode())})
    done = cli("verify", copy)
    assert done.code == 1
    assert "runner.py: is not what this version writes" in done.out
    reseal(copy, versions={**stated["versions"], "certipatch": "0.0.1"})
    assert cli("verify", copy).code == 0


def test_an_answer_that_differs_is_refused_and_named(
    cli, trained: Path, certified: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, examine = tmp_path / "deployed", Deployed.examine

    def otherwise(self, pixels, label=None, **how):
        verdict = examine(self, pixels, label, **how)
        if label != 1:
            return verdict
        changes = {"defended_label": 2, "certified": False, "failing_pair": (0, 0), "failing_label": 2}
        return type(verdict)(
            **{**vars(verdict), **changes, "unchangeable": True, "forgeable": True, "case": "agreed"}
        )

    monkeypatch.setattr(Deployed, "examine", otherwise)
    done = export(cli, trained, certified, photos, out)
    refused(done, "answers differ", "on 8 images", "green/0.png", "and 5 more", "is not finished")
    refused(cli("predict", photos / "red" / "0.png", model=out), "expected --certified")
    monkeypatch.undo()
    refused(export(cli, trained, certified, photos, out), "expected an empty folder", "--resume")


def test_other_pixels_are_refused_and_named(
    cli, trained: Path, certified: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(of_deployed, "preprocess", lambda image, spec: np.zeros((3, 32, 32), np.uint8))
    done = export(cli, trained, certified, photos, tmp_path / "deployed")
    refused(done, "pixels differ", "on 24 images", "blue/0.png")


def test_an_interrupted_export_goes_on(
    cli, trained: Path, certified: Path, photos: Path, folder: Path, tmp_path: Path, monkeypatch, blocks_of
):
    out, examine, seen = tmp_path / "deployed", Deployed.examine, []
    monkeypatch.setattr("certipatch.certification.experiment.BLOCK", 32)
    monkeypatch.setattr("certipatch.certification.blocks.BLOCK", 5)

    def some(self, *words, **how):
        seen.append(1)
        if len(seen) == 12:
            raise KeyboardInterrupt
        return examine(self, *words, **how)

    monkeypatch.setattr(Deployed, "examine", some)
    assert export(cli, trained, certified, photos, out).code == 130
    assert not of_deployed.is_deployed(out)
    seen[:] = [1] * 100
    done = export(cli, trained, certified, photos, out, resume=True)
    assert done.code == 0, done.err
    assert len(seen) == 100 + 24 - 10
    assert read_records(out / "certificate") == read_records(folder / "certificate")


def test_without_data_there_is_no_certificate(
    cli, trained: Path, certified: Path, photos: Path, tmp_path: Path
):
    out = tmp_path / "deployed"
    done = cli("export", trained, certified=certified, out=out)
    assert done.code == 0, done.err
    assert "certificate: none" in done.out
    assert json.loads(bare(out / "runner.py", "--about").stdout)["certificate"] is None
    assert json.loads(cli("predict", photos / "red" / "0.png", model=out, prove=True).out)["class"] == "red"


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_one_line_and_exit_code_3(
    cli, trained: Path, certified: Path, photos: Path, tmp_path: Path, monkeypatch, library: str
):
    monkeypatch.setitem(sys.modules, library, None)
    done = export(cli, trained, certified, photos, tmp_path / "deployed")
    assert done.code == 3
    assert done.err.splitlines() == [
        f"certipatch: export: expected the extra onnx, found no {library}; pip install 'certipatch[onnx]'"
    ]
    assert not (tmp_path / "deployed").exists()


def test_a_runner_without_onnxruntime_says_so(
    folder: Path, cli, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    command = [
        sys.executable,
        "-I",
        "-c",
        BARE.replace('"onnx"', '"onnxruntime"'),
        str(folder / "runner.py"),
        "x",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert "pip install onnxruntime" in done.stderr
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = cli("predict", photos / "red" / "0.png", model=folder)
    assert (done.code, "certipatch[onnx]" in done.err) == (3, True)


def test_bad_input(
    cli, trained: Path, certified: Path, photos: Path, folder: Path, copy: Path, tmp_path: Path
):
    image, out = photos / "red" / "0.png", tmp_path / "out"
    refused(export(cli, trained, certified, photos, folder), "holds an export already")
    refused(export(cli, trained, trained, photos, out), "expected records of certify")
    refused(export(cli, trained, certified, photos, photos / "new"), "outside of the data")
    refused(export(cli, tmp_path / "none", certified, photos, out), "no training run")
    refused(cli("predict", image, model=folder, certified=certified), "an export has all of its own")
    refused(cli("predict", image, model=folder, device="cuda"), "on the CPU")
    refused(cli("predict", image, model=folder, weights="w.pth"), "has its own weights")
    refused(cli("serve", model=folder, certified=certified, port=0), "has its own certificate")
    refused(cli("serve", model=trained, port=0), "expected --certified FOLDER")
    refused(
        cli("predict", image, model=trained, certified=folder / "certificate"),
        "is of another model",
        "weights",
    )
    (copy / "defended.onnx").write_bytes(b"no graph")
    refused(cli("predict", image, model=copy), "not the graph that was certified")
    stated = json.loads((copy / "defended.json").read_bytes())
    reseal(copy, files={**stated["files"], "defended.onnx": of_export.sha256(b"no graph")})
    refused(cli("predict", image, model=copy), "onnxruntime cannot load it")
    for damage in (b"", b"{", b"[]", b'{"format": 1}', b"\xff", b"[" * 100_000):
        (copy / "defended.json").write_bytes(damage)
        refused(cli("predict", image, model=copy), "defended.json: damaged")
        assert cli("verify", copy).code == 1


def test_a_certification_that_is_not_finished(cli, trained: Path, photos: Path, tmp_path: Path, blocks_of):
    blocks_of(8)
    done = cli("certify", model=trained, data=photos, **GEOMETRY, shard="1/2", out=tmp_path / "c")
    assert done.code == 0, done.err
    done = export(cli, trained, tmp_path / "c", photos, tmp_path / "deployed")
    refused(done, "expected finished records")


def test_the_service_answers_with_an_export(folder: Path, photos: Path):
    pytest.importorskip("fastapi", reason="needs the extra serve")
    from starlette.testclient import TestClient

    from certipatch.deploy.service import Limits, service

    app = service(Deployed.open(folder), {}, Limits(), {"127.0.0.1"})
    with TestClient(app, base_url="http://127.0.0.1:8000") as calling:
        while calling.get("/health").status_code == 503:
            pass
        for record in random.Random(0).sample(read_records(folder / "certificate"), 8):
            found = calling.post("/prove", content=(photos / record.name).read_bytes()).json()
            assert (found["label"], found["case"], found["pixels"]) == (
                record.defended_label,
                record.case,
                record.pixels,
            )
            assert found["unchangeable"] == record.unchangeable
        known = calling.get("/about").json()
        assert known["certified_robust_accuracy"]["images"] == 24
        assert known["onnxruntime"]["here"] == onnxruntime.__version__


def test_several_shapes_and_challenger_masking(cli, trained: Path, photos: Path, tmp_path: Path):
    """By place too, and with a batch size of one's own."""
    way = {"patch": "16x16+20x10", "masks_per_axis": 3, "inference": "challenger", "places": True}
    done = cli("certify", model=trained, data=photos, **way, out=tmp_path / "c")
    assert done.code == 0, done.err
    done = export(cli, trained, tmp_path / "c", photos, tmp_path / "deployed", batch_size=7, threads=2)
    assert done.code == 0, done.err
    ours, theirs = read_records(tmp_path / "deployed" / "certificate"), read_records(tmp_path / "c")
    assert differences(ours, theirs) == []
    assert [record.proven for record in ours] == [record.proven for record in theirs]
    assert any(record.certified for record in ours)


def test_a_vision_transformer_and_a_function_of_ones_own(
    cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "exported_vit.py").write_text(VIT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = "exported_vit:model"
    certify = {"model": name, "data": photos, "patch": 4, "masks_per_axis": 2, "prove": True}
    done = cli("certify", **certify, out=tmp_path / "c")
    assert done.code == 0, done.err
    done = export(cli, name, tmp_path / "c", photos, tmp_path / "deployed")
    assert done.code == 0, done.err
    ours, theirs = read_records(tmp_path / "deployed" / "certificate"), read_records(tmp_path / "c")
    clear = [one.index for one in theirs if one.margin >= 1e-3]
    assert len(clear) > 5
    assert not set(differences(ours, theirs)) & {theirs[i].name for i in clear}
    done = cli("verify", tmp_path / "deployed", model=tmp_path / "deployed", data=photos, sample=2)
    assert done.code == 0, done.out


VIT = """
import timm
import torch
from torch import nn
from torchvision.transforms import Normalize


def model():
    torch.manual_seed(0)
    network = timm.create_model("test_vit", img_size=32, num_classes=3)
    nn.init.normal_(network.head.weight)
    found = nn.Sequential(Normalize((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)), network)
    found.preprocessing = {"image_size": 32}
    return found
"""


def test_a_network_that_draws_its_graph_wrong_is_exported_the_other_way(
    trained: Path, certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As torch's new exporter did for months: what it writes is compared, and the one before takes over."""
    from certipatch.deploy import graph as of_graph

    defense, write = load_defense(trained, certified, device="cpu"), of_graph._export

    def wrong(module, boxes, masks, path, exporter, views):
        if exporter == "dynamo":
            module = Views(
                torch.nn.Sequential(module.masked.network, torch.nn.Softmax(1)), module.masked.fill
            )
        write(module.eval(), boxes, masks, path, exporter, views)

    monkeypatch.setattr(of_graph, "_export", wrong)
    found = write_graph(defense.model, defense.fill, defense.masks, tmp_path / "g.onnx", views=10, threads=1)
    assert found["exporter"] == "torchscript"
    monkeypatch.setattr(of_graph, "EXPORTERS", ("dynamo",))
    with pytest.raises(of_graph.ModelError, match=r"cannot be exported .*answers otherwise"):
        write_graph(defense.model, defense.fill, defense.masks, tmp_path / "g.onnx", views=10, threads=1)
