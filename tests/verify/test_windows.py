"""What ``verify`` says of the threat of a defense by windows, of which the certificate is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from certipatch.certification.certify import certify
from certipatch.data.load import load_source
from certipatch.geometry.masks import MaskSet
from certipatch.models.build import build, describe
from certipatch.models.runs import Opened, open_run
from certipatch.runtime.devices import make_fabric
from certipatch.verify.check import verify
from tampering import forge, lines_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def certified(trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images against two patches at once."""
    out = tmp_path_factory.mktemp("windows") / "c"
    model, source = open_run(trained), load_source(str(photos)).take([0, 1, 8, 9])
    masks = MaskSet.covering(image_size=model.spec.image_size, patch_size=(2, 2), masks_per_axis=1, patches=2)
    certify(model, source, masks, out, fabric=make_fabric(device="cpu"), defense="ds", windows="columns:4/2")
    return out


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("patches", 7, "threat.patches is 7, expected 1 or 2"),
        ("patches", 2.0, "threat.patches is 2.0"),
        ("patches", 0, "threat.patches is 0"),
        ("patch_size", [2.0, 2], "not whole numbers of pixels"),
        ("other_patch_sizes", [[1, 3.0]], "not whole numbers of pixels"),
    ],
)
def test_a_threat_that_is_not_reckoned_with_is_named(
    certified: Path, tmp_path: Path, entry: str, value: Any, words: str
):
    """Without this the certificates of two patches would pass for those of seven."""
    assert verify(certified).confirmed
    shutil.copytree(certified, tmp_path / "c")
    manifest = json.loads((certified / "manifest.json").read_text())
    manifest["experiment"]["threat"][entry] = value
    forge(tmp_path / "c", lines_of(certified), manifest)
    found = [str(finding) for finding in verify(tmp_path / "c").findings]
    assert any(words in line for line in found), found


@pytest.mark.parametrize("moved", [10**400, -1, "x", True])
def test_a_movement_that_is_none_is_named(certified: Path, tmp_path: Path, moved: Any):
    shutil.copytree(certified, tmp_path / "c")
    manifest = json.loads((certified / "manifest.json").read_text())
    manifest["environment"]["network"]["moved"] = moved
    forge(tmp_path / "c", lines_of(certified), manifest)
    found = [str(finding) for finding in verify(tmp_path / "c").findings]
    assert any("environment.network.moved" in line for line in found), found


def test_cells_that_are_said_to_be_shown_windows_are_named(photos: Path, tmp_path: Path):
    """Verify would look at other evidence than the cells give, with which another function was certified."""
    source = load_source(str(photos)).take([0, 1, 8, 9])
    spec = describe("small-bagnet", classes=source.classes, num_classes=3, image_size=(32, 32))
    model, out = Opened.of(spec, build(spec)), tmp_path / "c"
    masks = MaskSet.covering(image_size=(32, 32), patch_size=(2, 2), masks_per_axis=1)
    how = {"defense": "patchguard", "windows": "cells:5/1"}
    certify(model, source, masks, out, fabric=make_fabric(device="cpu"), **how)
    assert verify(out).confirmed
    written = json.loads((out / "manifest.json").read_text())
    for entry in ({"fill": [0.5] * 3}, {"tokens": "filled"}, {"fill": [0.5] * 3, "tokens": "filled"}):
        forge(out, lines_of(out), {**written, "experiment": {**written["experiment"], **entry}})
        found = [str(finding) for finding in verify(out).findings]
        assert any("expected none, for cells see the whole image" in line for line in found), found
