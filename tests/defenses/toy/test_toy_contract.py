"""A new defense is a folder of two files and one row: with these it has certify, resume, report and verify.

The toy defense of this folder stands for the next real one. Nothing else of the library knows of it.
"""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from certipatch.certification.methods import METHODS, Method
from defenses.contract import DefenseContract, LookedUp
from defenses.toy.defense import ToyDefense
from inputs import typed
from worlds import WORLDS, World, random_classifier

ROW = Method(
    kind="certify",
    build=lambda model, masks, way, **options: ToyDefense(model, masks.image_size, masks.threat, **options),
    views=lambda _masks, **_options: 8,
    options=("bands",),
)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The one row."""
    monkeypatch.setitem(METHODS, "toy", ROW)


class TestToy(DefenseContract):
    method = "toy"
    options: ClassVar = {"bands": 16}
    worlds = (
        World((1, 5), (1, 1), 3, values=3, fill=3),
        World((1, 7), (1, 1), 3, values=2, fill=2),
        *WORLDS[8:],
    )
    geometry: ClassVar = {"patch_size": (6, 1), "masks_per_axis": 2}

    def build(self, model, masks, fill):
        bands = masks.image_size[1] if masks.image_size[1] < 16 else 16
        defense = ToyDefense(model, masks.image_size, masks.threat, bands=bands)
        defense.fill = fill
        return defense

    def twins(self, world, fill):
        """A bound that reckons with one band less than the patch can reach."""
        for seed in range(60):
            model = LookedUp(world, random_classifier(world, seed)).eval()
            defense = ToyDefense(model, world.image, world.masks.threat, bands=world.image[1], most=0)
            defense.fill = fill
            yield model, defense


def test_the_command_line_takes_it(cli, trained, photos, tmp_path):
    """certify, resume, report and verify, with no other change than the folder and the row."""
    out, page = tmp_path / "out", tmp_path / "page.html"
    asked = typed("certify", model=trained, data=photos, patch="6x1", defense="toy", device="cpu", out=out)
    done = cli(*asked, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert 0 < found["certified_robust_accuracy"]["count"] < 24
    assert json.loads((out / "manifest.json").read_text())["experiment"]["defense"] == "toy"
    line = json.loads((out / "records.jsonl").read_text().splitlines()[0])
    assert sum(line["votes"]) == 8
    assert (line["slack"] >= 0) == line["certified"]

    assert cli(*asked).code == 2
    assert cli(*asked, "--resume").code == 0
    other = typed("certify", model=trained, data=photos, patch="6x1", device="cpu", out=out)
    refused = cli(*other, "--resume")
    assert refused.code == 2
    assert "defense: 'toy' there" in refused.err

    shown = cli("report", out, "--html", page, "--data", photos)
    assert shown.code == 0, shown.err
    assert "defense: toy" in shown.out
    text = page.read_text()
    assert "toy" in text
    assert 'aria-labelledby="h-where" hidden' in text  # what needs masks is not shown
    assert "with a margin below" not in text

    checked = cli("verify", out, "--model", trained, "--data", photos)
    assert checked.code == 1, checked.out  # nothing is wrong, and no image could be looked at again
    assert "nothing wrong found" in checked.out
    assert "toy" in checked.out


def test_a_name_that_is_none_is_refused(cli, trained, photos, tmp_path):
    asked = typed("certify", model=trained, data=photos, patch=5, defense="tyo", out=tmp_path / "out")
    done = cli(*asked)
    assert done.code == 2
    assert done.err.startswith("certipatch: defense 'tyo': expected one of patchcleanser, minority-reports")
