"""A comparison of certified defenses: one budget for all, options chosen on images that are not tested."""

from __future__ import annotations

import json

import pytest

from certipatch.errors import ConfigError
from certipatch.reproduce.compare import compared, flops, images_of
from certipatch.reproduce.recipe import read_recipe
from inputs import write_photos

RECIPE = """
title = "A comparison"
claim = "Nothing is claimed."
paper_of = ["table1"]

[comparison]
data = "photos"
location = "nowhere"
train_split = "train"
test_split = "val"
train_images = 12
held_out_images = 6
test_images = 9
image_size = 32
train_patch = "5"
patches = ["2", "5"]
published = { 2 = "14", 5 = "35" }
gflop = 0.05
batch_size = 8
seeds = [0]

[[comparison.rows]]
name = "ds"
defense = "ds"
options = { windows = "columns:8" }
choose = { theta = [0.9, 0.3] }
model = "small-cnn"
train = { strategy = "random-band", windows = "columns:8" }

[[comparison.rows]]
name = "patchguard-ds"
defense = "patchguard"
options = { windows = "columns:8" }
model = "small-cnn"
trained_as = "ds"

[[comparison.rows]]
name = "bagcert"
defense = "bagcert"
options = { windows = "cells:9/2" }
model = "small-bagnet-9"
train = { loss = "region-margin" }

[[comparison.rows]]
name = "ibp"
defense = "ibp"
masks_per_axis = 2
model = "ibp-small"
train = { loss = "interval" }
whole = 0.0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "train", each=8)
    write_photos(folder / "val", each=3)
    return folder


def test_the_shipped_comparison_has_the_eight_and_one_budget():
    recipe = read_recipe("comparators")
    runs = compared(recipe.comparison, only="seed0", scale=1.0)
    eight = ["patchcleanser", "ds", "patchguard-ds", "smoothed-vit", "clipped-bagnet"]
    eight += ["patchguard-bagnet", "bagcert", "ibp"]
    assert [one.row.name for one in runs][:8] == eight
    for one in runs:
        (whole, own), each = one.epochs, flops(one.row.model, 32) / 1e9
        assert each * (3 * whole + one.passes * own) == pytest.approx(recipe.comparison.gflop, rel=0.06)


def test_images_to_choose_by_are_neither_trained_on_nor_tested(place, tmp_path):
    (tmp_path / "mine.toml").write_text(RECIPE)
    comparison = read_recipe(str(tmp_path / "mine.toml")).comparison
    images = images_of(comparison, {"photos": str(place)}, 1.0)
    parts = [set(part.names) for part in (images.train, images.held_out)]
    assert [len(images.train), len(images.held_out), len(images.test)] == [12, 12, 9]
    assert not parts[0] & parts[1]


def test_from_an_empty_folder_to_the_table(cli, place, tmp_path):
    path, out = tmp_path / "mine.toml", tmp_path / "out"
    path.write_text(RECIPE)
    asked = ("reproduce", path, "--data", f"photos={place}", "--out", out, "--device", "cpu")
    dry = cli(*asked, "--dry-run")
    assert dry.code == 0
    assert "photos-compared/bagcert-seed0: small-bagnet-9," in dry.out
    assert not out.exists()
    done = cli(*asked)
    assert done.code == 0, done.err
    text = (out / "mine.md").read_text()
    assert text.count("## Every") == 2
    assert "| 86.0 / 60.0 |" in text  # the paper's BagCert, 2.4 %
    cells = json.loads((out / "mine.json").read_text())
    assert len(cells) == 8
    assert all(cell["certified_robust_accuracy"]["images"] == 9 for cell in cells)
    tried = sorted(each.name for each in (out / "photos-compared" / "ds-seed0-chosen").iterdir())
    assert tried == ["theta-0.3", "theta-0.9"]
    before = {file: file.stat().st_mtime_ns for file in out.rglob("manifest.json")}
    again = cli(*asked)
    assert again.code == 0
    assert {file: file.stat().st_mtime_ns for file in out.rglob("manifest.json")} == before
    assert (out / "mine.md").read_text() == text


def test_what_cannot_be_meant_is_refused(tmp_path):
    def read(change, to):
        path = tmp_path / "wrong.toml"
        path.write_text(RECIPE.replace(change, to, 1))
        return compared(read_recipe(str(path)).comparison, only=None, scale=1.0)

    for change, to, complaint in [
        ('name = "bagcert"', 'name = "ds"', "rows: the same name twice"),
        ('trained_as = "ds"', 'trained_as = "ibp"', "expected a row above patchguard-ds"),
        ('defense = "bagcert"', 'defense = "bagcerd"', "defense 'bagcerd': expected one of"),
        ('loss = "region-margin"', 'loss = "hinge"', "loss"),
        ("choose = { theta = [0.9, 0.3] }", 'choose = { tokens = ["filled"] }', "defense 'ds'"),
        ('patches = ["2", "5"]', 'patches = ["99"]', "patch"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            read(change, to)
