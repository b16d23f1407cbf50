"""Recipes, and the tables made from them."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from certipatch.certification.certify import certify as certify_source
from certipatch.errors import ConfigError
from certipatch.models.build import build, describe
from certipatch.models.weights import weights_sha256
from certipatch.reproduce.plan import plan, published
from certipatch.reproduce.recipe import FOLDER, NAMES, PATCHCLEANSER, read_recipe
from certipatch.training.strategies import STRATEGIES
from inputs import write_manifest, write_photos

TABLES = [name for name in NAMES if name != "comparators"]  # which has no setups but a comparison

RECIPE = """
title = "A test"
claim = "Nothing is claimed."
figure = true

[[paper]]
data = "photos"
model = "small-cnn"
strategy = "greedy-coarse"
patch = "2.4%"
masks_per_axis = 2
certified_robust_accuracy = 12.5

[[setup]]
data = "photos"
location = "nowhere"
train_split = "train"
test_split = "val"
train_images = 18
test_images = 9
models = ["small-cnn"]
base = { epochs = 1, lr = 0.05, train_images = 18 }
image_size = 32
train_patch = "2.4%"
patches = ["2.4%"]
masks_per_axis = [2, 3]
strategies = ["random-cutout", "greedy-coarse"]
equal_compute = [["random-cutout", "greedy-coarse"]]
seeds = [0]
epochs = 1
batch_size = 8
note = "A test only."
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "train", each=6)
    write_photos(folder / "val", each=3)
    return folder


@pytest.fixture
def reproduce(cli, place, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    return lambda out, *options: cli(
        "reproduce", path, "--data", f"photos={place}", "--out", out, "--device", "cpu", *options
    )


def test_the_papers_tables_are_there():
    assert set(NAMES) == {"table1", "table2", "table3", "tableA1", "figure5", "lite0", "comparators"}
    data = {run.setup.data for name in TABLES for run in plan(read_recipe(name))}
    assert {"imagenet", "imagenette", "cifar10", "cifar100", "svhn"} <= data


@pytest.mark.parametrize("name", TABLES)
def test_every_published_value_has_its_cell(name):
    """A value that no run matches would silently be missing from the table; each must be found exactly
    once."""
    recipe = read_recipe(name)
    found = [
        published(recipe, run, patch, k)
        for run in plan(recipe)
        for patch, k in run.certifications
        if run.seed == 0
    ]
    every = Counter(value.cell for value in found if value)
    assert set(every.values()) <= {1}
    assert set(every) >= {value.cell for value in recipe.paper if value.defense == PATCHCLEANSER}


def test_recipes_hold_the_papers_patches():
    """DESIGN.md: 1, 2 and 3 % are 23, 32 and 39 pixels of 224; CIFAR's and SVHN's 2x2 and 5x5 of 32 become 14
    and 35."""
    found = {}
    for run in (run for name in TABLES for run in plan(read_recipe(name)) if run.setup.image_size == 224):
        sizes = {run.masks(patch, 3).patch_size for patch in run.setup.patches}
        found.setdefault(run.setup.data, set()).update(sizes)
    large, small = {(23, 23), (32, 32), (39, 39)}, {(14, 14), (35, 35)}
    assert found == {
        "imagenet": large,
        "imagenette": large,
        "cifar10": small,
        "cifar100": {(35, 35)},  # the paper's Table 2 has the larger patch alone
        "svhn": {(35, 35)},
    }


def test_imagenette_carries_the_leakage_note():
    for name in TABLES:
        for setup in read_recipe(name).setup:
            assert ("training split" in setup.note) == (setup.data == "imagenette")


def test_table3_compares_all_strategies():
    papers = [name for name in STRATEGIES if name != "random-band"]  # which is that of other defenses
    for data in ("cifar10", "cifar10-48px"):
        rows = [run.row for run in plan(read_recipe("table3"), only=f"{data},seed0")]
        assert rows[: len(papers)] == papers


def test_cost_is_what_the_paper_counts():
    runs = {run.row: run for run in plan(read_recipe("table3"), only="imagenette")}
    cost = {row: run.train_passes / run.train_images / run.epochs for row, run in runs.items()}
    expected = {
        "vanilla": 3,
        "random-both": 6,
        "gutout-fine": 4 + 3,
        "gutout-both": 8 + 6,
        "greedy-coarse": 17 + 3,
        "greedy-fine": 71 + 3,
        "greedy-multisize": 26 + 6,
        "grid-coarse": 45 + 3,
        "grid-fine": 666 + 3,
    }
    assert {row: cost[row] for row in expected} == expected
    control = runs["random-cutout, compute of greedy-multisize"]
    assert control.epochs == round(10 * 32 / 3)
    assert runs["vanilla"].certify_passes("3%", 6) == 3925 * 667


def test_only_and_scale():
    recipe = read_recipe("table1")
    assert [
        run.epochs for run in plan(recipe, only="random-cutout-compute-of-greedy-multisize,vit*,imagenet")
    ] == [107]
    runs = plan(recipe, only="imagenette,resnet*,!*compute*", scale=0.1)
    assert [run.row for run in runs] == ["random-cutout", "random-both", "greedy-multisize"]
    assert {(run.train_images, run.test_images) for run in runs} == {(947, 393)}
    assert all("-x0.1/" in run.name for run in runs)  # another experiment, another folder
    for bad in ({"only": "svhn"}, {"scale": 0}, {"scale": 1.5}):
        with pytest.raises(ConfigError):
            plan(recipe, **bad)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("epochs = 1\nbatch", "epoch = 1\nbatch"), "setup.0.epoch: Extra inputs"),
        (("train_images = 18\ntest", "train_images = 0\ntest"), "setup.0.train_images"),
        (("title", "[title"), "not a TOML file"),
        (('"greedy-coarse"]', '"greedy-coarce"]'), "strategy 'greedy-coarce': expected one of"),
        (('patches = ["2.4%"]', 'patches = ["240%"]'), "patch '240%'"),
        (('models = ["small-cnn"]', 'models = ["small-cnn", "small-cnn"]'), "models: the same value twice"),
        (("seeds = [0]", "seeds = [0, 0]"), "seeds: the same value twice"),
        (("masks_per_axis = [2, 3]", "masks_per_axis = []"), "setup.0.masks_per_axis"),
        (
            ("epochs = 1\nbatch", "epochs = 0\nbatch"),
            "epochs: Input should be greater than or equal to 1, found 0",
        ),
        (("[[setup]]", "[[setup]]\nweights = 'file'"), "base and weights: only one of them"),
        (('models = ["small-cnn"]', 'models = ["no-such-net"]'), "unknown model 'no-such-net'"),
        (('["random-cutout", "greedy-coarse"]]', '["random-cutout", "greedy"]]'), "strategy 'greedy'"),
        (("epochs = 1\nbatch", f"epochs = {'9' * 5000}\nbatch"), "not a TOML file that can be read"),
    ],
)
def test_a_wrong_recipe_is_one_line(cli, tmp_path, change, complaint):
    path = tmp_path / "wrong.toml"
    path.write_text(RECIPE.replace(*change, 1))
    outcome = cli("reproduce", path, "--out", tmp_path / "out", "--device", "cpu")
    assert outcome.code == 2
    assert complaint in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_from_an_empty_folder_to_a_table_interrupted_and_continued(reproduce, tmp_path, monkeypatch):
    """Stopped in the middle it shows what is there; continued, it ends with the table of an undisturbed
    run."""
    certify, calls = certify_source, []

    def third_time_interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return certify(*args, **kwargs)

    out = tmp_path / "out"
    monkeypatch.setattr("certipatch.reproduce.run.certify", third_time_interrupted)
    assert reproduce(out).code == 130
    half = json.loads((out / "mine.json").read_text())["cells"]
    assert [cell["images"] for cell in half] == [9, 9] + [None] * 4  # an empty cell, never a guess
    assert [cell["records"] is not None for cell in half] == [True, True] + [False] * 4

    assert reproduce(out).code == 0
    assert len(calls) == 7  # 6 certifications, one of them begun twice
    whole = json.loads((out / "mine.json").read_text())["cells"]
    assert all(cell["images"] == 9 for cell in whole)
    assert whole[:2] == half[:2]

    monkeypatch.setattr("certipatch.reproduce.run.certify", certify)
    assert reproduce(tmp_path / "undisturbed").code == 0
    assert (tmp_path / "undisturbed" / "mine.json").read_text() == (out / "mine.json").read_text()

    # Done is done.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
    assert len(before) == 1 + 3 + 6
    again = reproduce(out)
    assert again.code == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")} == before
    assert "2.4%" in again.out

    # What is in the files.
    text = (out / "mine.md").read_text()
    assert "| greedy-coarse | 0 | 1 | 1 | 20 |" in text
    assert "| random-cutout, compute of greedy-coarse | 0 | 7 | 1 | 21 |" in text
    assert "paper k=2" in text
    assert "12.5" in text
    assert "batches of 8, 32-true. A test only." in text
    rows = list(csv.DictReader((out / "mine.csv").read_text().splitlines()))
    assert [row["certified_robust_accuracy_count"] for row in rows] == [
        str(c["certified_robust_accuracy"]["count"]) for c in whole
    ]
    assert [row["paper_certified_robust_accuracy_percent"] for row in rows].count("12.5") == 1
    assert (out / "mine.png").stat().st_size > 10_000
    assert (out / "mine.svg").read_text().lstrip().startswith("<?xml")


def test_a_dry_run_plans_and_writes_nothing(reproduce, tmp_path):
    outcome = reproduce(tmp_path / "out", "--dry-run", "--json", "--tflops", 0.001)
    assert outcome.code == 0
    tasks = {task["folder"]: task for task in json.loads(outcome.out)}
    assert len(tasks) == 1 + 3 * 3
    greedy = tasks["photos-small-cnn/greedy-coarse-seed0"]
    assert greedy["passes"] == 18 * 20
    macs = (
        16 * 3 * 9 * 16**2 + 32 * 16 * 9 * 8**2 + 64 * 32 * 9 * 8**2 + 64 * 64 * 9 * 4**2 + 1024 * 1000
    )  # a head of 1000 classes
    assert greedy["flops"] == 2 * macs * greedy["passes"]
    assert greedy["seconds"] == pytest.approx(greedy["flops"] / 1e9)
    assert not (tmp_path / "out").exists()


def test_one_run_that_fails_does_not_stop_the_others(cli, place, tmp_path):
    """A second setup of data that is not there: its runs fail, the first one's are done, the exit code
    tells."""
    path = tmp_path / "two.toml"
    setup = RECIPE[RECIPE.index("[[setup]]") :]
    path.write_text(RECIPE + setup.replace('data = "photos"', 'data = "lost"'))
    outcome = cli(
        "reproduce", path, data=f"photos={place}", out=tmp_path / "out", only="random-cutout", device="cpu"
    )
    assert outcome.code == 2
    assert "1 of 2 runs failed; the first: lost-small-cnn/random-cutout-seed0" in outcome.err
    assert "--data lost=PLACE says where it is" in outcome.err
    cells = json.loads((tmp_path / "out" / "two.json").read_text())["cells"]
    assert [cell["images"] for cell in cells if cell["row"] == "random-cutout"] == [9, 9, None, None]


@pytest.fixture
def done(reproduce, tmp_path):
    """A finished run, to be tampered with."""
    assert reproduce(tmp_path / "out", "--only", "random-cutout").code == 0
    return tmp_path / "out"


def shown(out):
    cells = json.loads((out / "mine.json").read_text())["cells"]
    return [cell["images"] for cell in cells if cell["row"] == "random-cutout"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("batch_size = 8", "batch_size = 9"), "train.batch_size: 8 there, 9 here"),
        (("train_images = 18\ntest", "train_images = 17\ntest"), "data.images: 18 there, 17 here"),
        (("test_images = 9", "test_images = 8"), "data.images: 9 there, 8 here"),
        (
            ('location = "nowhere"', 'location = "nowhere"\nprecision = "bf16-mixed"'),
            "precision: '32-true' there, 'bf16-mixed' here",
        ),
        (('train_patch = "2.4%"', 'train_patch = "3%"'), "train.patch_size"),
    ],
)
def test_what_another_recipe_left_is_not_shown_as_this_ones(reproduce, done, tmp_path, change, complaint):
    assert shown(done) == [9, 9]
    (tmp_path / "mine.toml").write_text(RECIPE.replace(*change, 1))
    outcome = reproduce(done, "--only", "random-cutout")
    assert outcome.code == 2
    assert complaint in outcome.err
    assert shown(done) == [None, None]


def test_certificates_of_other_weights_are_not_shown(reproduce, done):
    """The training was thrown away and done again from another base: its certificates are of weights that are
    gone."""
    shutil.rmtree(done / "photos-small-cnn" / "random-cutout-seed0")
    (base,) = done.glob("*/base/manifest.json")
    weights = done / "photos-small-cnn" / "base" / "model.safetensors"
    state = {
        key: value + 0.01 if value.is_floating_point() else value for key, value in load_file(weights).items()
    }
    save_file(state, weights)
    network = build(
        describe("small-cnn", classes=("blue", "green", "red"), num_classes=3), weights=str(weights)
    )
    manifest = json.loads(base.read_text())
    manifest["finished"]["weights_sha256"] = weights_sha256(network)
    write_manifest(base, manifest)
    outcome = reproduce(done, "--only", "random-cutout")
    assert outcome.code == 2
    assert "weights_sha256" in outcome.err
    assert shown(done) == [None, None]


def test_fewer_images_than_the_recipe_says_are_refused(reproduce, tmp_path):
    (tmp_path / "mine.toml").write_text(RECIPE.replace("test_images = 9", "test_images = 10"))
    outcome = reproduce(tmp_path / "out", "--only", "random-cutout")
    assert outcome.code == 2
    assert "expected at least 10 test images, as the recipe says, found 9" in outcome.err


def test_a_run_that_another_process_is_at_is_left_to_it(reproduce, tmp_path):
    """So that the same command, started on several machines, divides the runs among them."""
    place = tmp_path / "out" / "photos-small-cnn"
    place.mkdir(parents=True)
    with FileLock(place / ".greedy-coarse-seed0.lock"):
        outcome = reproduce(tmp_path / "out", "--only", "!*compute*")
    assert outcome.code == 0
    assert "greedy-coarse-seed0: another process is at it" in outcome.err
    cells = json.loads((tmp_path / "out" / "mine.json").read_text())["cells"]
    assert [cell["images"] for cell in cells] == [9, 9, None, None, None, None]


def test_unknown_data_name(reproduce, tmp_path):
    outcome = reproduce(tmp_path / "out", "--data", "cifar10=somewhere")
    assert outcome.code == 2
    assert "expected NAME=PLACE with a name out of photos" in outcome.err


def test_recipes_are_installed_with_the_package():
    assert all((FOLDER / f"{name}.toml").is_file() for name in NAMES)
