"""A folder of a stranger makes a report open nothing, say nothing that is not so, and work for no minute."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certipatch.errors import CertiPatchError
from certipatch.records.read import read_folder
from certipatch.report.attack import attack_text
from certipatch.report.compared import compare
from certipatch.report.images import images_of
from inputs import typed, write_manifest, write_photos

WRITTEN = Path(__file__).parents[1] / "records" / "format-1"
SECONDS = 10  # what a report of a small folder may take; it takes well below one


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of some small folders, in the current folder."""
    monkeypatch.chdir(shutil.copytree(WRITTEN, tmp_path / "format-1"))
    return tmp_path / "format-1"


def change(folder: Path, how: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as a forger would, with its hash mended."""
    manifest = json.loads((folder / "manifest.json").read_text())
    how(manifest)
    write_manifest(folder / "manifest.json", manifest)


# The place of the images.


def run(cli, folder: Path, data: Path) -> Path:
    """A certification of images in a folder."""
    model = typed(model="small-cnn", pretrained=False)[:2]
    import safetensors.torch

    from certipatch.models.small import SmallCNN

    safetensors.torch.save_file(SmallCNN(3).state_dict(), folder.parent / "w.safetensors")
    options = typed(weights=folder.parent / "w.safetensors", data=data, patch=8, masks_per_axis=2, limit=3)
    done = cli("certify", *model, *options, out=folder)
    assert done.code == 0, done.err
    return folder


def note(cli, folder: Path, *options: object) -> str:
    """What a page of a folder leaves out, and why."""
    done = cli("report", folder, "--html", folder.with_suffix(".html"), *options)
    assert done.code == 0, done.err
    return done.err


def test_what_lies_beside_the_folder_is_shown(cli, tmp_path: Path):
    (tmp_path / "inside").mkdir()
    folder = run(cli, tmp_path / "run", write_photos(tmp_path / "photos"))
    assert note(cli, folder) == ""
    moved = Path(shutil.move(folder, tmp_path / "inside" / "run"))
    assert "not opened unasked" in note(cli, moved)
    assert note(cli, moved, "--data", tmp_path / "photos") == ""
    change(moved, lambda m: m.update(data=str(tmp_path / "inside" / ".." / "photos")))
    assert "not opened unasked" in note(cli, moved)


@pytest.mark.parametrize("what", ["folder", "class", "file", "tar"])
def test_no_link_leads_out(cli, tmp_path: Path, what: str):
    """A link beside the folder to what lies elsewhere, or in a class of it."""
    elsewhere, beside = write_photos(tmp_path / "elsewhere"), tmp_path / "beside"
    beside.mkdir()
    data = beside / "photos"
    if what == "folder":
        data.symlink_to(elsewhere)
    elif what == "class":
        shutil.copytree(elsewhere, data)
        shutil.rmtree(data / "red")
        (data / "red").symlink_to(elsewhere / "red")
    elif what == "file":
        shutil.copytree(elsewhere, data)
        (data / "red" / "0.png").unlink()
        (data / "red" / "0.png").symlink_to(elsewhere / "red" / "0.png")
    else:
        data = Path(shutil.make_archive(str(elsewhere), "tar", elsewhere))
        data = (beside / "photos.tar").symlink_to(data) or beside / "photos.tar"
    folder = run(cli, beside / "run", data)
    assert "not opened unasked" in note(cli, folder)
    assert note(cli, folder, "--data", data) == ""


PLACES = (
    *("torch/cifar10", "hfds/stranger/data", "hfids/stranger/data", "tfds/mnist", "wds//etc", "wds/."),
    *("/usr/lib", "/", "/proc", "/dev/zero", "~", "..", "../..", "/net/host/x", "\\\\host\\share", "\x00"),
    *("http://localhost/x", "hf-hub:x/y", "x" * 5000, "certified/../../..", "\udcff", " digits", "DIGITS"),
)


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
def test_no_other_place_is_opened(written: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    opened: list[object] = []
    monkeypatch.setattr("certipatch.data.load.load_source", lambda *a, **_: opened.append(a))
    change(written / "certified", lambda m: m.update(data=place))
    with pytest.raises(CertiPatchError, match="not opened unasked"):
        images_of(read_folder(Path("certified")).manifest)
    assert opened == []


# Numbers that drive work.


def model(**entries: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["experiment"]["model"].update(entries)


def of_masks(**entries: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["experiment"]["masks"].update(entries)


def large(side: int) -> Callable[[dict[str, Any]], object]:
    """An image size in all places, so that nothing contradicts it."""

    def how(manifest: dict[str, Any]) -> None:
        model(image_size=[side, side])(manifest)
        of_masks(image_size=[side, side])(manifest)

    return how


SCATTERED = [[[i, (7 * i) % 9_000, 1 + i % 900, 1 + i % 800]] for i in range(9_000)]
NUMBERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "image size": large(10_000),
    "image size of two sides": model(image_size=[32, 10_000]),
    "image size beyond": large(10**9),
    "crop": model(crop_pct=0.01),
    "crop of nothing": model(crop_pct=1e-9),
    "crop below zero": model(crop_pct=-1.0),
    "crop mode": model(crop_mode="random"),
    "interpolation": model(interpolation="random"),
    "classes": model(num_classes=10**6),
    "masks": of_masks(windows=[[[0, 0, 12, 12]]] * 200_000),
    "scattered masks": lambda m: (large(10_000)(m), of_masks(windows=SCATTERED)(m)),
    "masks per axis": of_masks(masks_per_axis=10_000),
    "shapes": of_masks(other_patch_sizes=[[1, 1 + i] for i in range(9_000)]),
    "patch": of_masks(patch_size=[10_000, 10_000]),
    "images": lambda m: m["experiment"]["data"].update(images=10**12),
}


@pytest.mark.parametrize("how", NUMBERS.values(), ids=NUMBERS)
def test_no_number_keeps_a_reader_busy(cli, written: Path, how: Callable[[dict[str, Any]], object]):
    """Page, figures, verify and attack end at once, each with its answer or one line."""
    change(written / "certified", how)
    for words in (
        ("report", "certified", "--html", "page.html"),
        ("report", "certified", "--figures", "figures"),
        ("verify", "certified"),
    ):
        began = time.monotonic()
        done = cli(*words)
        assert time.monotonic() - began < SECONDS, words
        assert done.code in (0, 1, 2)  # verify finds something: 1
        assert "Traceback" not in done.err


# An attack beside its certification.


def rewrite(folder: Path, how: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the lines of an attack, with all hashes mended."""
    path = folder / "attacks.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    how(lines)
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(data)
    change(folder, lambda m: m["finished"].update(lines=len(lines), sha256=hashlib.sha256(data).hexdigest()))


def certify_all(lines: list[dict[str, Any]]) -> None:
    """Every image is certified, and withstood."""
    for line in lines:
        line.update(certified=True, broken=False, ways=0, defended_label=line["label"])
        if line["top"] is None:
            of_patch = {"top": 0, "left": 0, "height": 3, "width": 3, "attempts": 1, "pixels": "0" * 64}
            line.update(of_patch, image=f"patched/{line['index']}.png")


FORGED: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "all certified": certify_all,
    "a certificate less": lambda lines: next(line for line in lines if line["certified"]).update(
        certified=False
    ),
    "label": lambda lines: lines[0].update(label=9),
    "name": lambda lines: lines[0].update(name="other"),
}


@pytest.mark.parametrize("how", FORGED.values(), ids=FORGED)
def test_a_forged_attack_beside_its_certification(
    cli, written: Path, how: Callable[[list[dict[str, Any]]], object]
):
    rewrite(written / "attacked", how)
    for words in (("attacked", "certified"), ("certified", "attacked", "--html", "page.html")):
        done = cli("report", *words)
        assert (done.code, done.out) == (2, "")
        (line,) = done.err.splitlines()
        assert "expected (name, label, certified) as in certified" in line
    done = cli("report", "attacked", "detected")
    assert done.code == 0, done.err
    assert "proven" not in " ".join(done.out.split("attacked\n")[1:])
    assert "as the attack states" in done.out


def test_proven_is_said_beside_the_certification_only(cli, written: Path):
    beside, alone = cli("report", "certified", "attacked"), cli("report", "attacked")
    assert "it is right under every patch, proven" in beside.out
    assert "as the attack states" not in beside.out
    assert "proven" not in alone.out
    assert "as the attack states" in alone.out
    assert cli("report", "attacked", html="page.html").code == 0
    page = (written / "page.html").read_text()
    assert "right under every patch, as the attack states" in page
    assert "right under every patch, proven" not in page
    (found,) = compare([read_folder(Path("attacked"))]).attacks
    assert found.summary["certificates_as_stated"] is True
    assert "proven" not in attack_text(found.summary)


@pytest.mark.parametrize("indices", [[0, 1, 2, 4], [0, 1, 2, 3, 4, 5, 9], [0, 0]])
def test_images_of_choice_are_no_sample(cli, written: Path, indices: list[int]):
    """An attack that says that it is on 3 of 6 images is on those spread over all, and on no others."""

    def choose(lines: list[dict[str, Any]]) -> None:
        lines[:] = [{**lines[index % 6], "index": index} for index in indices]

    rewrite(written / "attacked", choose)
    change(written / "attacked", lambda m: m["experiment"].update(images=3))
    done = cli("report", "attacked")
    assert done.code == 2, done.out
    assert len(done.err.splitlines()) == 1


def test_another_experiment_under_the_same_hash(cli, written: Path):
    change(written / "attacked", lambda m: m["experiment"]["certification"].update(weights_sha256="0" * 64))
    done = cli("report", "certified", "attacked")
    assert (done.code, "is of another experiment than certified" in done.err) == (2, True), done.err
