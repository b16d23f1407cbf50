"""``verify`` finds nothing in an untouched folder and names whatever was tampered with.

It does so even where the forger has mended the hashes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from certipatch.certification.certify import certify
from certipatch.data.load import load_source
from certipatch.geometry.masks import MaskSet
from certipatch.models.build import build
from certipatch.models.runs import Opened, open_run
from certipatch.runtime.devices import make_fabric
from certipatch.verify.algorithms import double_masking_restated
from certipatch.verify.check import verify
from certipatch.verify.findings import Given
from certipatch.verify.geometry import _covering, uncovered, uncovered_pair
from certipatch.verify.geometry import demanded as verify_geometry_demanded
from inputs import write_manifest, write_photos
from tampering import Manifest, findings, forge, lines_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def given(trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Given, Any]:
    """A certification of 9 images with 4 masks, its model and its data."""
    model = open_run(trained)
    source = load_source(str(photos))
    folder = tmp_path_factory.mktemp("verify") / "c"
    masks = MaskSet.covering(image_size=model.spec.image_size, patch_size=(12, 12), masks_per_axis=2)
    certify(model, source.first(9), masks, folder, fabric=make_fabric(device="cpu"))
    certified = [line["certified"] for line in lines_of(folder)]
    assert True in certified
    assert False in certified
    return folder, model, source


def test_an_untouched_folder(given):
    folder, model, source = given
    found = verify(folder, model=model, source=source, sample=None, device="cpu")
    assert found.findings == []
    assert (found.images, found.recomputed, found.undecided) == (9, 9, 0)
    assert found.certified == sum(line["certified"] for line in lines_of(folder))
    assert "nothing wrong found" in found.text(again=True)
    assert verify(folder).recomputed == 0
    assert verify(folder, model=model, source=source, sample=4, device="cpu").recomputed == 4


def certified(lines: list[dict[str, Any]], wanted: bool) -> dict[str, Any]:
    return next(line for line in lines if line["certified"] is wanted)


def make_certified(lines: list[dict[str, Any]]) -> None:
    """A whole false certificate, consistent in itself."""
    certified(lines, False).update(
        {
            key: certified(lines, True)[key]
            for key in ("certified", "case", "failing_pair", "failing_label", "passes", "margin")
        }
    )
    for line in lines:
        if line["certified"]:
            line["defended_label"] = line["label"]


def swap(lines: list[dict[str, Any]]) -> None:
    """Two images change places with all that was found about them."""
    lines[0]["index"], lines[1]["index"] = lines[1]["index"], lines[0]["index"]


def wrong_label(lines: list[dict[str, Any]]) -> None:
    line = certified(lines, False)
    line.update(failing_label=next(iter({0, 1, 2} - {line["label"], line["failing_label"]})))


def hide_a_certificate(lines: list[dict[str, Any]]) -> None:
    line = certified(lines, True)
    line.update(certified=False, failing_pair=[0, 1], failing_label=(line["label"] + 1) % 3)


def turn(field: str, wanted: bool | None = None) -> Callable[[list[dict[str, Any]]], None]:
    """Another label in a field of the first line, or of the first that is certified or not."""

    def change(lines: list[dict[str, Any]]) -> None:
        line = lines[0] if wanted is None else certified(lines, wanted)
        line[field] = (line[field] + 1) % 3

    return change


def set_first(**fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Other entries in the first line."""
    return lambda lines: lines[0].update(fields)


def set_where(wanted: bool, **fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Other entries in the first line that is certified, or that is not."""
    return lambda lines: certified(lines, wanted).update(fields)


def raise_the_margin(lines: list[dict[str, Any]]) -> None:
    certified(lines, True)["margin"] += 0.1


LABELS = ("vanilla_label", "defended_label", "case", "failing_pair", "failing_label", "margin")
UNREAD = {"error": "cannot be read", "passes": 0, "certified": False, "pixels": None, **dict.fromkeys(LABELS)}
RECORDS: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "flag raised": (set_where(False, certified=True), "certified"),
    "flag lowered": (set_where(True, certified=False), "not certified, but failing_pair"),
    "false certificate": (make_certified, "is not certified: masks"),
    "true certificate hidden": (hide_a_certificate, "is certified, which the record says it is not"),
    "flag as a number": (set_first(certified=1), "certified is 1"),
    "line dropped": (lambda lines: lines.pop(3), "lack image"),
    "line doubled": (lambda lines: lines.append(lines[2]), "line 10: image 2 occurs twice"),
    "line invented": (lambda lines: lines.append(lines[2] | {"index": 9}), "hold image 9 of only 9"),
    "index below zero": (lambda lines: lines[2].update(index=-1), "expected an index from 0 up"),
    "index as a word": (lambda lines: lines[2].update(index="2"), "expected an index from 0 up"),
    "places exchanged": (swap, "fingerprint"),
    "label changed": (set_first(label=2), "fingerprint"),
    "name changed": (set_first(name="another"), "fingerprint"),
    "name of another with a new line": (set_first(name="x\nimage 1: \x1b[31m"), "fingerprint"),
    "margin raised": (raise_the_margin, "margin"),
    "margin not finite": (set_first(margin=float("inf")), "not a finite number"),
    "margin missing": (set_first(margin=None), "not a finite number"),
    "margin negative": (set_first(margin=-1.0), "not a finite number"),
    "case changed": (set_where(True, case="majority"), "other fields say it is not"),
    "defended label changed": (turn("defended_label", False), "one mask alone does not answer"),
    "vanilla label changed": (turn("vanilla_label"), "vanilla_label"),
    "label of no class": (set_first(vanilla_label=3), "not classes below 3"),
    "failing pair changed": (set_where(False, failing_pair=[3, 9]), "failing_pair [3, 9]"),
    "failing label changed": (wrong_label, "the record says"),
    "passes lowered": (set_where(True, passes=5), "passes 5"),
    "pixels of another": (
        lambda lines: lines[0].update(pixels=lines[1]["pixels"]),
        "its pixels are not those",
    ),
    "pixels no hash": (set_first(pixels="x"), "pixels is not a sha256"),
    "said to be unreadable": (set_first(**UNREAD), "can be read, the record says 'cannot be read'"),
    "field added": (set_first(note="fine"), "other or missing ones: note"),
    "field removed": (lambda lines: lines[0].pop("error"), "other or missing ones: error"),
}


@pytest.mark.parametrize(("change", "words"), RECORDS.values(), ids=RECORDS)
def test_tampered_records(
    given, tmp_path: Path, change: Callable[[list[dict[str, Any]]], object], words: str
):
    """It is found although the forger has mended the hash, and the hash says it too if they have not."""
    shutil.copytree(given[0], tmp_path / "c")
    lines = lines_of(given[0])
    change(lines)
    forge(tmp_path / "c", lines)
    found = findings(tmp_path / "c", given)
    assert any(words in line for line in found), found
    forge(tmp_path / "c", lines, json.loads((given[0] / "manifest.json").read_text()), reseal=False)
    assert any("sha256" in line for line in findings(tmp_path / "c", given, sample=0))


def experiment(*path: str | int) -> Callable[[Manifest, Any], None]:
    """Set an entry of the experiment."""

    def change(manifest: Manifest, value: Any) -> None:
        at = manifest["experiment"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


MANIFESTS: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "larger patch": (lambda m: experiment("masks", "patch_size")(m, [14, 14]), "is covered by no mask"),
    "smaller patch": (lambda m: experiment("masks", "patch_size")(m, [4, 4]), "are not those that"),
    "no patch": (lambda m: experiment("masks", "patch_size")(m, [0, 4]), "does not fit"),
    "other k": (lambda m: experiment("masks", "masks_per_axis")(m, 3), "are not those that"),
    "k of zero": (lambda m: experiment("masks", "masks_per_axis")(m, 0), "masks_per_axis is 0"),
    "mask dropped": (lambda m: m["experiment"]["masks"]["windows"].pop(1), "is covered by no mask"),
    "mask moved": (lambda m: experiment("masks", "windows", 0)(m, [[1, 0, 22, 22]]), "is covered by no mask"),
    "mask enlarged": (lambda m: experiment("masks", "windows", 0)(m, [[0, 0, 24, 24]]), "are not those that"),
    "mask outside": (
        lambda m: experiment("masks", "windows", 0)(m, [[-4, 0, 26, 22]]),
        "is not a window within",
    ),
    "other size": (lambda m: experiment("masks", "image_size")(m, [40, 40]), "is not the model's"),
    "fill": (lambda m: experiment("fill")(m, [0.4, 0.5, 0.5]), "fill"),
    "fill that nobody asked for": (lambda m: experiment("fill")(m, [0.25] * 3), "the model's mean"),
    "precision unknown": (lambda m: experiment("precision")(m, "32"), "precision is '32', expected"),
    "precision of others": (lambda m: experiment("precision")(m, "64-true"), "precision is '64-true'"),
    "precision of nothing": (lambda m: experiment("precision")(m, None), "precision is None"),
    "fill of one colour": (lambda m: experiment("fill")(m, m["experiment"]["fill"][:1]), "fill"),
    "weights": (lambda m: experiment("weights_sha256")(m, "0" * 64), "other weights"),
    "mean": (lambda m: experiment("model", "mean")(m, [0.4, 0.5, 0.5]), "model.mean"),
    "classes": (lambda m: experiment("model", "classes")(m, ["a", "b", "c"]), "model.classes"),
    "training": (lambda m: experiment("trained", "strategy")(m, "grid-fine"), "trained.strategy"),
    "fewer images": (lambda m: experiment("data", "images")(m, 8), "hold image 8 of only 8"),
    "more images": (lambda m: experiment("data", "images")(m, 10), "lack image 9 of 10"),
    "fingerprint": (lambda m: experiment("data", "fingerprint")(m, "0" * 64), "fingerprint"),
    "data sample": (lambda m: experiment("data", "sample")(m, "0" * 64), "data.sample"),
    "exhaustive": (lambda m: experiment("exhaustive")(m, "no"), "exhaustive is"),
    "entry removed": (lambda m: m["experiment"].pop("fill"), "other entries"),
    "entry added": (lambda m: m["experiment"].update(note=1), "other entries"),
    "kind": (lambda m: m.update(kind="train"), "expected format 1 of certify"),
    "format": (lambda m: m.update(format=2), "expected format 1 of certify"),
    "not finished": (lambda m: m.update(finished=None), "is not finished"),
    "lines": (lambda m: m["finished"].update(lines=8), "expected the 8 lines"),
    "hash": (lambda m: m["finished"].update(sha256="0" * 64), "sha256"),
    "no masks": (lambda m: experiment("masks")(m, None), "damaged"),
    "windows of words": (lambda m: experiment("masks", "windows")(m, [["a"]]), "damaged"),
}


@pytest.mark.parametrize(("change", "words"), MANIFESTS.values(), ids=MANIFESTS)
def test_tampered_manifest(given, tmp_path: Path, change: Callable[[Manifest], object], words: str):
    shutil.copytree(given[0], tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    change(manifest)
    write_manifest(tmp_path / "c" / "manifest.json", manifest)
    found = findings(tmp_path / "c", given, sample=1)
    assert any(words in line for line in found), found


@pytest.fixture(scope="module")
def given_two(
    given: tuple[Path, Given, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Given, Any]:
    """A certification against two patches of two shapes."""
    _, model, source = given
    folder = tmp_path_factory.mktemp("verify-two") / "c"
    masks = MaskSet.covering(
        image_size=model.spec.image_size,
        patch_size=(12, 1),
        other_patch_sizes=[(1, 12)],
        masks_per_axis=2,
        patches=2,
    )
    certify(model, source.first(6), masks, folder, fabric=make_fabric(device="cpu"))
    assert True in [line["certified"] for line in lines_of(folder)]
    return folder, model, source


def of_masks(**entries: Any) -> Callable[[Manifest], object]:
    return lambda m: m["experiment"]["masks"].update(entries)


SHAPES_AND_PATCHES: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "larger other shape": (of_masks(other_patch_sizes=[[1, 16]]), "covered by no mask"),
    "smaller other shape": (of_masks(other_patch_sizes=[[1, 11]]), "are not those that"),
    "shape added": (of_masks(other_patch_sizes=[[1, 12], [20, 2]]), "covered by no mask"),
    "shape forgotten": (lambda m: m["experiment"]["masks"].pop("other_patch_sizes"), "are not those that"),
    "shape of one side": (of_masks(other_patch_sizes=[[4]]), "damaged"),
    "shape that does not fit": (of_masks(other_patch_sizes=[[1, 33]]), "does not fit"),
    "shapes as a number": (of_masks(other_patch_sizes=4), "damaged"),
    "fewer patches": (of_masks(patches=1), "are not those that"),
    "more patches": (of_masks(patches=3), "masks.patches is 3"),
    "patches as a flag": (of_masks(patches=True), "masks.patches is True"),
    "patches as a number with a point": (of_masks(patches=2.0), "masks.patches is 2.0"),
    "mask dropped": (lambda m: m["experiment"]["masks"]["windows"].pop(0), "are covered by no mask"),
    "window dropped": (lambda m: m["experiment"]["masks"]["windows"][0].pop(1), "are covered by no mask"),
    "mask added": (
        lambda m: m["experiment"]["masks"]["windows"].append([[0, 0, 32, 32]]),
        "are not those that",
    ),
}


@pytest.mark.parametrize(("change", "words"), SHAPES_AND_PATCHES.values(), ids=SHAPES_AND_PATCHES)
def test_tampered_shapes_and_patches(
    given_two, tmp_path: Path, change: Callable[[Manifest], object], words: str
):
    shutil.copytree(given_two[0], tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    found = findings(tmp_path / "c", given_two, sample=0)
    assert any(words in line for line in found), found


def test_several_shapes_and_two_patches(given, given_two, tmp_path: Path):
    """An untouched folder; and one that claims two patches, or another shape, on the masks for one."""
    folder, model, source = given_two
    found = verify(folder, model=model, source=source, sample=None, device="cpu")
    assert (found.findings, found.images, found.recomputed) == ([], 6, 6)
    for claim, words in (
        ({"patches": 2}, "are covered by no mask"),
        ({"other_patch_sizes": [[2, 30]]}, "is covered by no mask"),
    ):
        shutil.copytree(given[0], tmp_path / words)
        manifest = json.loads((given[0] / "manifest.json").read_text())
        of_masks(**claim)(manifest)
        (tmp_path / words / "manifest.json").write_text(json.dumps(manifest))
        assert any(words in line for line in findings(tmp_path / words, given, sample=0))


def copied(bad: dict[str, Any], good: dict[str, Any], *but: str) -> None:
    """What was found about a readable image is said of the unreadable one, but for some fields."""
    bad.update({key: value for key, value in good.items() if key not in but})


def exchanged(bad: dict[str, Any], good: dict[str, Any]) -> None:
    bad["index"], good["index"] = good["index"], 3


def given_away(bad: dict[str, Any], good: dict[str, Any]) -> None:
    good.update(bad | {"index": good["index"], "name": good["name"]})


def say(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    """Other entries in the line of the unreadable image."""
    return lambda bad, good: bad.update(fields)


NO_VERDICT = "no labels and no certificate"
UNREADABLE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "said to be certified": (lambda bad, good: copied(bad, good, "index", "name"), "cannot be read"),
    "with the labels of another": (
        lambda bad, good: copied(bad, good, "index", "name", "label", "error"),
        NO_VERDICT,
    ),
    "with a certificate": (say(certified=True), NO_VERDICT),
    "with passes": (say(passes=11), NO_VERDICT),
    "with no passes as a flag": (say(passes=False), NO_VERDICT),
    "with pixels": (lambda bad, good: bad.update(pixels=good["pixels"]), NO_VERDICT),
    "without a reason": (say(error=""), "is no reason"),
    "with a number for a reason": (say(error=0), "is no reason"),
    "under another name": (say(name="blue/9.png"), "the record has 'blue/9.png'"),
    "under another label": (say(label=2), "the record has 'blue/3.png' with label 2"),
    "place exchanged": (exchanged, "can be read"),
    "given to a readable one": (given_away, "can be read"),
}


@pytest.fixture(scope="module")
def with_unreadable(given, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Given, Any]:
    """A certification of 8 images of one class, of which number 3 cannot be read."""
    place = tmp_path_factory.mktemp("unreadable")
    shutil.copytree(photos, place / "photos")
    (place / "photos" / "blue" / "3.png").write_bytes(b"")
    model = given[1]
    source = load_source(str(place / "photos"))
    source = source.take(range(8))
    masks = MaskSet.covering(image_size=model.spec.image_size, patch_size=(12, 12), masks_per_axis=2)
    certify(model, source, masks, place / "c", fabric=make_fabric(device="cpu"))
    return place / "c", model, source


@pytest.mark.parametrize(("change", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_images(
    with_unreadable, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object], words: str
):
    """Found although the hash of the records and the fingerprint of names and labels are mended; the others
    are looked at all the same."""
    assert findings(with_unreadable[0], with_unreadable) == []
    shutil.copytree(with_unreadable[0], tmp_path / "c")
    lines = lines_of(tmp_path / "c")
    assert [line["index"] for line in lines if line["error"]] == [3]
    change(lines[3], certified(lines, True))
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    names = "".join(
        f"{line['name']}\0{line['label']}\n" for line in sorted(lines, key=lambda line: line["index"])
    )
    manifest["experiment"]["data"]["fingerprint"] = hashlib.sha256(names.encode()).hexdigest()
    forge(tmp_path / "c", lines, manifest)
    found = findings(tmp_path / "c", with_unreadable)
    assert any(words in line for line in found), found
    lines[7] |= {"margin": 1e6}
    forge(tmp_path / "c", lines, manifest)
    assert any("image 7" in line and "margin" in line for line in findings(tmp_path / "c", with_unreadable))


def test_an_image_that_became_unreadable(given):
    """And the images after it are looked at."""
    folder, model, source = given

    def vanished(i: int):
        if source.names[i] == lines_of(folder)[4]["name"]:
            raise FileNotFoundError("gone")
        return source.open(i)

    found = findings(folder, (folder, model, replace(source, open=vanished)))
    assert any(
        "image 4" in line
        and "cannot be read (FileNotFoundError: gone), and the record does not say so" in line
        for line in found
    )
    assert not any("image 5" in line for line in found)


def test_other_weights_and_other_data(given, photos: Path, tmp_path: Path):
    folder, model, source = given
    state = {key: value.clone() for key, value in model.network.state_dict().items()}
    other = build(model.spec)
    other.load_state_dict(state | {"1.13.bias": state["1.13.bias"] + torch.tensor([0.0, 0.0, 5.0])})
    found = findings(folder, (folder, Opened.of(model.spec, other, model.trained), source))
    assert "other weights" in found[0]
    assert any("vanilla_label" in line or "margin" in line for line in found[1:])
    shutil.copytree(photos, tmp_path / "photos")
    write_photos(tmp_path / "photos", each=1, size=33)
    found = findings(folder, (folder, model, load_source(str(tmp_path / "photos"))))
    assert "data.sample" in found[0]
    assert any("its pixels are not those" in line for line in found)


def test_damaged_files(given, tmp_path: Path):
    folder = tmp_path / "c"
    assert "has no manifest" in findings(folder, given)[0]
    shutil.copytree(given[0], folder)
    data = (folder / "records.jsonl").read_bytes()
    for damaged, words in [
        (data[:-5], "ends in the middle of a line"),
        (data.replace(b'{"index": 3', b'{"index" 3'), "line 4: is not JSON"),
        (data + b"[]\n", "line 10: expected the fields"),
        (data + b"[" * 100_000 + b"\n", "line 10: is not JSON"),
    ]:
        (folder / "records.jsonl").write_bytes(damaged)
        assert any(words in line for line in findings(folder, given, sample=0))
    (folder / "records.jsonl").unlink()
    assert any("lack image 0 and 8 more of 9" in line for line in findings(folder, given, sample=0))
    for damaged in (b"", b"[]", b"null", b"\xff", b"[" * 100_000):
        (folder / "manifest.json").write_bytes(damaged)
        assert "damaged" in findings(folder, given)[0]


def test_shards(given, tmp_path: Path):
    """A part that is missing is named; one of another experiment, too; lines without a manifest, too."""
    folder = tmp_path / "c"
    shutil.copytree(given[0], folder)
    (folder / "manifest.json").rename(folder / "manifest-1-of-2.json")
    (folder / "records.jsonl").rename(folder / "records-1-of-2.jsonl")
    assert findings(folder, given) == [f"{folder}: lacks shard 2 of 2"]
    manifest = json.loads((folder / "manifest-1-of-2.json").read_text())
    manifest["experiment"]["weights_sha256"] = "0" * 64
    manifest["finished"] |= {"lines": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    write_manifest(folder / "manifest-2-of-2.json", manifest)
    assert "another experiment" in findings(folder, given)[0]
    (folder / "manifest-2-of-2.json").unlink()
    (folder / "records-2-of-2.jsonl").write_text("")
    assert any("no manifest beside it" in line for line in findings(folder, given))


def test_the_restatements_agree_with_the_oracle():
    """Geometry and Algorithm 1, written a third time: equal to the naive page of the tests."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        size, k = rng.integers(4, 12, 2).tolist(), int(rng.integers(1, 5))
        patch = [int(rng.integers(1, n - 1)) for n in size]
        if k > max(n - p + 1 for n, p in zip(size, patch, strict=True)):
            continue
        windows, _ = (
            oracle.covering_set(size, patch, min(k, size[0] - patch[0] + 1))
            if size[0] - patch[0] == size[1] - patch[1]
            else (None, None)
        )
        mine = [(*corner, height, width) for corner, height, width in _covering(size, patch, k)]
        if windows is not None:
            assert [[window] for window in mine] == windows
        keeps = np.stack([oracle.keep_of(size, [window]) for window in mine])
        assert uncovered(keeps, *patch) is None
        holes = oracle.uncovered(size, patch, keeps[1:]) if len(keeps) > 1 else []
        assert uncovered(keeps[1:], *patch) == (holes[0] if holes else (0, 0) if len(keeps) == 1 else None)
    for _ in range(60):
        size = rng.integers(2, 5, 2).tolist()
        shapes = [[int(rng.integers(1, n + 1)) for n in size] for _ in range(rng.integers(1, 3))]
        k = min(
            int(rng.integers(1, 4)),
            *(n - p + 1 for shape in shapes for n, p in zip(size, shape, strict=True)),
        )
        for patches in (1, 2):
            demanded = oracle.covering_several(size, shapes, k, patches)
            mine = list(verify_geometry_demanded(size, shapes, k, patches, len(demanded)))
            assert [[tuple(window) for window in mask] for mask in mine] == demanded
            assert len(list(verify_geometry_demanded(size, shapes, k, patches, len(demanded) - 1))) >= len(
                demanded
            )
        keeps = np.stack([oracle.keep_of(size, mask) for mask in demanded])
        assert uncovered_pair(keeps, shapes) is None
        if len(keeps) > 1:
            holes = oracle.uncovered_together(size, shapes, keeps[1:], 2)
            pair = uncovered_pair(keeps[1:], shapes)
            assert (pair is None) == (holes == [])
            assert pair is None or tuple(sorted((*at, *shape) for shape, at in pair)) in [
                tuple(sorted(hole)) for hole in holes
            ]
    for _ in range(500):
        table = rng.integers(0, 3, (5, 5))
        table = np.triu(table) + np.triu(table, 1).T
        assert double_masking_restated(
            table.diagonal().tolist(), lambda i, table=table: table[i].tolist()
        ) == oracle.double_masking(table.tolist())


def test_command(cli, given, trained: Path, photos: Path, tmp_path: Path):
    folder = given[0]
    done = cli("verify", folder, "--all", "--json", model=trained, data=photos)
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)
    assert found.pop("folder") == str(folder)
    assert 0 < found.pop("certified") < 9
    counts = {"images": 9, "below": 0, "recomputed": 9, "undecided": 0}
    assert found == {"kind": "certify", **counts, "findings": []}
    assert cli("verify", folder).code == 0
    shutil.copytree(folder, tmp_path / "c")
    lines = lines_of(folder)
    forge(tmp_path / "c", [lines[0] | {"name": "[red]\x1b[2J\nx"}, *lines[2:]])
    done = cli("verify", tmp_path / "c")
    assert done.code == 1
    assert len(done.out.splitlines()) == 2
    assert "lack image 1 of 9" in done.out
    assert "\x1b" not in done.out
    assert cli("verify", folder, "--model", "small-cnn").code == 2
    assert cli("verify", folder, "--weights", "x").code == 2


def test_certificates_that_rounding_could_turn_are_counted_apart(given, tmp_path: Path):
    folder = tmp_path / "c"
    shutil.copytree(given[0], folder)
    lines = lines_of(folder)
    certificates = [line for line in lines if line["certified"]]
    certificates[0]["margin"] = 9e-4
    forge(folder, lines)
    found = verify(folder)
    assert (found.certified, found.below) == (len(certificates) - 1, 1)
    assert "1 more with a margin that rounding could turn" in found.text(again=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    least = sorted(line["margin"] for line in certificates)[1]
    manifest["environment"]["network"]["moved"] = least * 1.01
    write_manifest(folder / "manifest.json", manifest)
    found = verify(folder)
    assert (found.certified, found.below) == (len(certificates) - 2, 2)


class NearTie(torch.nn.Module):
    """The two best logits of each view differ by ``gap``; with ``mixing`` by the mean of the batch too."""

    def __init__(self, inner: torch.nn.Module, gap: float, mixing: float = 0.0) -> None:
        super().__init__()
        self.inner, self.gap, self.mixing = inner, gap, mixing  # the inner one says which colour fills masks

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tie = torch.tensor([self.gap, 0.0, -9.0]).expand(len(images), 3)
        return tie + self.mixing * images.mean() * torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize("gap", [4e-4, -4e-4, -4e-3])
def test_what_is_not_confirmed_is_no_success(given, tmp_path: Path, cli, gap: float):
    """A record that says 0 where the best of two nearly equal labels is 1: within rounding it is not
    confirmed, beyond it is wrong."""
    _, model, source = given
    opened = replace(model, network=NearTie(model.network, 4e-4).eval())
    out = tmp_path / "c"
    masks = MaskSet.covering(image_size=opened.spec.image_size, patch_size=(12, 12), masks_per_axis=2)
    certify(opened, source.first(9), masks, out, fabric=make_fabric(device="cpu"))
    other = replace(model, network=NearTie(model.network, gap).eval())
    found = verify(out, model=other, source=source, sample=None, device="cpu")
    wrong = [line for line in map(str, found.findings) if "weights" not in line]
    assert bool(wrong) == (gap == -4e-3), wrong
    assert found.undecided == (9 if gap == -4e-4 else 0)
    assert found.confirmed == (gap == 4e-4)


def test_a_model_that_mixes_views_is_found(given):
    folder, model, source = given
    mixing = replace(model, network=NearTie(model.network, 1, 0.1).eval())
    found = verify(folder, model=mixing, source=source, sample=1, device="cpu")
    assert any("moves by" in str(finding) for finding in found.findings)
