"""A defense that ``verify`` has no restatement of: it checks whatever does not depend on the method, and says
that it looked at no image again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certipatch.certification.certify import certify
from certipatch.data.load import load_source
from certipatch.data.source import Source
from certipatch.geometry.masks import MaskSet
from certipatch.models.build import build
from certipatch.models.runs import Opened, open_run
from certipatch.runtime.devices import make_fabric
from certipatch.verify.check import verify
from certipatch.verify.methods import RESTATEMENTS, UNNAMED, restatement_of
from tampering import forge, lines_of

pytestmark = pytest.mark.usefixtures("one_thread")

Lines = list[dict[str, Any]]
Manifest = dict[str, Any]
Given = tuple[Path, Opened, Source]

OF_PATCHCLEANSER = ("case", "failing_pair", "failing_label")


@pytest.fixture(scope="module")
def given(trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A certification by a defense called toy, with an entry and a field of its own and without masks.

    Number 3 of its 9 images cannot be read.
    """
    place = tmp_path_factory.mktemp("toy")
    shutil.copytree(photos, place / "photos")
    (place / "photos" / "blue" / "3.png").write_bytes(b"")
    model = open_run(trained)
    source = load_source(str(place / "photos")).take([0, 1, 2, 3, 8, 9, 10, 16, 17])
    masks = MaskSet.covering(image_size=model.spec.image_size, patch_size=(12, 12), masks_per_axis=2)
    certify(model, source, masks, place / "c", fabric=make_fabric(device="cpu"))

    lines, manifest = lines_of(place / "c"), manifest_of(place / "c")
    assert {True, False} == {line["certified"] for line in lines if line["error"] is None}
    for line in lines:
        for field in OF_PATCHCLEANSER:
            line.pop(field)
        line["slack"] = None if line["error"] else 2 * line["certified"] - 1
    experiment = manifest["experiment"]
    for entry in ("masks", "fill", "exhaustive"):
        experiment.pop(entry)
    experiment |= {"defense": "toy", "band": 4, "threat": {"image_size": [32, 32], "patch_size": [12, 12]}}
    forge(place / "c", lines, manifest)
    return place / "c", model, source


def manifest_of(folder: Path) -> Manifest:
    found: Manifest = json.loads((folder / "manifest.json").read_text())
    return found


def findings(folder: Path, given: Given) -> list[str]:
    _, model, source = given
    found = verify(folder, model=model, source=source, sample=None, device="cpu")
    assert found.recomputed == 0
    return list(map(str, found.findings))


def of(lines: Lines, certified: bool) -> dict[str, Any]:
    return next(line for line in lines if line["certified"] is certified and line["error"] is None)


def test_an_untouched_folder(given: Given):
    folder, model, source = given
    found = verify(folder, model=model, source=source, sample=None, device="cpu")
    assert found.findings == []
    assert (found.images, found.recomputed, found.undecided) == (9, 0, 0)
    assert found.certified == sum(line["certified"] for line in lines_of(folder))
    for again in (True, False):
        assert found.text(again=again) == (
            f"{folder}: {found.certified} of 9 certified; "
            "looked again at none (verify has no restatement of 'toy'); nothing wrong found"
        )
    assert found.to_json()["not_restated"] == "toy"
    assert not found.confirmed  # for it was asked to look at images again
    assert verify(folder).confirmed


def test_a_forger_who_gives_another_name_to_a_defense_is_not_confirmed(given: Given, tmp_path: Path):
    """What a name hides from the restatement is named, and not exit code 0."""
    folder, model, source = given
    shutil.copytree(folder, tmp_path / "c")
    lines = lines_of(folder)
    for line in lines:
        if line["error"] is None:
            line.update(certified=True, defended_label=line["label"], margin=9.0)
    forge(tmp_path / "c", lines)
    found = verify(tmp_path / "c", model=model, source=source, sample=None, device="cpu")
    assert (found.findings, found.certified) == ([], 8)
    assert not found.confirmed


def change(field: str, value: Any, *, certified: bool = True) -> Callable[[Lines], object]:
    """Set a field of the first line that is, or is not, certified."""
    return lambda lines: of(lines, certified).update({field: value})


def flip(certified: bool) -> Callable[[Lines], object]:
    """Flip the flag of an image whose defended answer is wrong, or take it from one without an answer."""

    def flipped(lines: Lines) -> None:
        line = of(lines, certified)
        line.update(certified=not certified, defended_label=(line["label"] + 1) % 3)

    return flipped


RECORDS: dict[str, tuple[Callable[[Lines], object], str]] = {
    "certified flipped on a wrong answer": (flip(certified=False), "is certified, but defended_label"),
    "certified with an alarm": (change("defended_label", None), "is certified, but defended_label None"),
    "answer of a certified image changed": (
        lambda lines: of(lines, True).update(defended_label=(of(lines, True)["label"] + 1) % 3),
        "is certified, but defended_label",
    ),
    "flag as a number": (change("certified", 1, certified=False), "certified is 1"),
    "label changed": (
        lambda lines: of(lines, False).update(label=(of(lines, False)["label"] + 1) % 3),
        "fingerprint",
    ),
    "label of no class": (change("label", 3), "expected a name and a label below 3"),
    "name changed": (change("name", "another"), "fingerprint"),
    "line removed": (lambda lines: lines.pop(4), "lack image 4 of 9"),
    "line doubled": (lambda lines: lines.append(lines[2]), "image 2 occurs twice"),
    "line invented": (lambda lines: lines.append(lines[2] | {"index": 9}), "hold image 9 of only 9"),
    "field removed": (lambda lines: lines[0].pop("margin"), "other or missing ones: margin"),
    "vanilla label of no class": (change("vanilla_label", 3), "are not classes below 3"),
    "vanilla label missing": (change("vanilla_label", None), "are not classes below 3"),
    "defended label of no class": (change("defended_label", -1, certified=False), "not classes below 3"),
    "margin negative": (change("margin", -1), "not a finite number"),
    "margin not finite": (change("margin", float("nan")), "not a finite number"),
    "margin of a great many digits": (change("margin", 10**400), "not a finite number"),
    "passes negative": (change("passes", -1), "passes -1 is not"),
    "passes as a flag": (change("passes", True), "passes True is not"),
    "pixels no hash": (change("pixels", "x"), "pixels is not a sha256"),
    "unreadable with a certificate": (lambda lines: lines[3].update(certified=True), "no certificate"),
    "unreadable with a label": (lambda lines: lines[3].update(defended_label=0), "no labels"),
    "unreadable without a reason": (lambda lines: lines[3].update(error=""), "is no reason"),
    "readable with an error": (change("error", "gone"), "no labels and no certificate"),
}


@pytest.mark.parametrize(("tamper", "words"), RECORDS.values(), ids=RECORDS)
def test_tampered_records(given: Given, tmp_path: Path, tamper: Callable[[Lines], object], words: str):
    """It is found although the forger has mended the hashes; and the hash says it too if they have not."""
    shutil.copytree(given[0], tmp_path / "c")
    lines = lines_of(given[0])
    tamper(lines)
    forge(tmp_path / "c", lines)
    found = findings(tmp_path / "c", given)
    assert any(words in line for line in found), found
    forge(tmp_path / "c", lines, manifest_of(given[0]), reseal=False)
    assert any("sha256" in line for line in findings(tmp_path / "c", given))


def test_what_a_method_may_say_of_its_own(given: Given, tmp_path: Path):
    """Other fields and entries, no margin, and an alarm in place of an answer where nothing is certified."""
    shutil.copytree(given[0], tmp_path / "c")
    lines, manifest = lines_of(given[0]), manifest_of(given[0])
    for line in lines:
        line |= {"margin": None, "weakest": [1, 2], "slack": {"any": "thing"}}
    of(lines, False)["defended_label"] = None
    manifest["experiment"]["evidence"] = "counts"
    forge(tmp_path / "c", lines, manifest)
    assert findings(tmp_path / "c", given) == []


def entry(key: str, value: Any) -> Callable[[Manifest], object]:
    return lambda manifest: manifest["experiment"].update({key: value})


def without(key: str) -> Callable[[Manifest], object]:
    return lambda manifest: manifest["experiment"].pop(key)


MANIFESTS: dict[str, tuple[Callable[[Manifest], object], str]] = {
    **{
        f"without {key}": (without(key), f"other entries than those of a certification: {key}")
        for key in ("model", "weights_sha256", "trained", "data", "device", "precision", "block")
    },
    "of PatchCleanser, not named": (without("defense"), "other entries"),
    "of PatchCleanser, named": (entry("defense", "patchcleanser"), "other entries"),
    "name as a number": (entry("defense", 3), "other entries"),
    "of detection": (lambda manifest: manifest.update(kind="detect"), "other entries"),
    "weights": (entry("weights_sha256", "0" * 64), "other weights"),
    "training": (entry("trained", None), "of another training"),
    "data": (lambda manifest: manifest["experiment"]["data"].update(sample="0" * 64), "data.sample"),
    "model": (lambda manifest: manifest["experiment"]["model"].update(mean=[0, 0, 0]), "model.mean"),
    "masks that are none": (entry("masks", None), "is damaged"),
    "not finished": (lambda manifest: manifest.update(finished=None), "is not finished"),
    "lines": (lambda manifest: manifest["finished"].update(lines=8), "expected the 8 lines"),
}


@pytest.mark.parametrize(("tamper", "words"), MANIFESTS.values(), ids=MANIFESTS)
def test_tampered_manifests(given: Given, tmp_path: Path, tamper: Callable[[Manifest], object], words: str):
    shutil.copytree(given[0], tmp_path / "c")
    manifest = manifest_of(given[0])
    tamper(manifest)
    forge(tmp_path / "c", lines_of(given[0]), manifest, reseal=False)
    found = findings(tmp_path / "c", given)
    assert any(words in line for line in found), found


def test_masks_are_checked_where_there_are_some(given: Given, tmp_path: Path):
    """An unknown defense with masks: they must cover the patch; without a fill there is none to check."""
    _, model, _ = given
    masks = MaskSet.covering(image_size=model.spec.image_size, patch_size=(12, 12), masks_per_axis=2)
    shutil.copytree(given[0], tmp_path / "c")
    manifest = manifest_of(given[0])
    manifest["experiment"]["masks"] = json.loads(json.dumps(masks.to_json()))
    forge(tmp_path / "c", lines_of(given[0]), manifest)
    assert findings(tmp_path / "c", given) == []
    manifest["experiment"]["fill"] = [0.0, 0.5, 0.5]
    manifest["experiment"]["masks"]["windows"].pop()
    forge(tmp_path / "c", lines_of(given[0]), manifest)
    found = findings(tmp_path / "c", given)
    assert any("is covered by no mask" in line for line in found)
    assert any("is not the model's mean" in line for line in found)


def test_shards(given: Given, tmp_path: Path):
    """A shard that is missing is named; so is one of another defense."""
    folder = tmp_path / "c"
    shutil.copytree(given[0], folder)
    (folder / "manifest.json").rename(folder / "manifest-1-of-2.json")
    (folder / "records.jsonl").rename(folder / "records-1-of-2.jsonl")
    assert findings(folder, given) == [f"{folder}: lacks shard 2 of 2"]
    manifest = json.loads((folder / "manifest-1-of-2.json").read_text())
    manifest["experiment"]["defense"] = "game"
    manifest["finished"] |= {"lines": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    manifest.pop("sha256")
    (folder / "manifest-2-of-2.json").write_text(json.dumps(manifest))
    assert any("another experiment" in line and "defense" in line for line in findings(folder, given))


def test_another_model_and_a_name_that_a_terminal_would_obey(given: Given, tmp_path: Path):
    folder, model, source = given
    other = Opened.of(model.spec, build(model.spec), model.trained)
    assert any("other weights" in line for line in findings(folder, (folder, other, source)))
    shutil.copytree(folder, tmp_path / "c")
    manifest = manifest_of(folder)
    manifest["experiment"]["defense"] = "\x1b[31m\n" + "x" * 1000
    forge(tmp_path / "c", lines_of(folder), manifest)
    text = verify(tmp_path / "c").text(again=False)
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text
    assert len(text) < 300 + len(str(tmp_path))


def test_the_table():
    """Each row stands under its own name; folders that name no defense are of the two from before there was a
    choice."""
    assert all(row.defense == name for (_, name), row in RESTATEMENTS.items())
    assert all(row.compare is not None and not row.further for row in RESTATEMENTS.values())
    for kind, row in UNNAMED.items():
        assert restatement_of(kind, {}) is restatement_of(kind, {"defense": row.defense}) is row
    assert restatement_of("certify", {"defense": "toy"}).compare is None
    assert restatement_of("detect", {"defense": "toy"}) is UNNAMED["detect"]
