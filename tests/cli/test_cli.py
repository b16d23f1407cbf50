"""The whole path as a user types it, on a small folder of images."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from certipatch.data.decode import decode
from certipatch.records.manifest import MANIFEST, read_manifest, read_manifest_file
from certipatch.records.read import read_lines, read_records
from inputs import typed, write_manifest


def test_masks_proves_coverage_and_states_the_costs(cli):
    shown = cli("masks", "--image-size", 224, "--patch", "3%", "--masks-per-axis", 6)
    assert shown.code == 0
    assert "39x39" in shown.out
    assert "each of the 34596 patch positions lies under a mask" in shown.out

    facts = json.loads(cli("masks", "--image-size", "224", "--patch", "3%", "--json").out)
    assert facts["starts"]["rows"] == [0, 31, 62, 93, 124, 155]
    assert facts["uncovered_patch"] is None
    assert facts["passes"]["certify_at_most"] == 666
    assert facts["passes"]["search"] == {
        "gutout-coarse": 4,
        "gutout-fine": 4,
        "gutout-both": 8,
        "greedy-coarse": 17,
        "greedy-fine": 71,
        "greedy-multisize": 26,
        "grid-coarse": 45,
        "grid-fine": 666,
    }


def test_train_with_gutout(cli, photos: Path, tmp_path: Path):
    """The one masked copy costs two rounds of a forward and a backward pass, which the papers count as one
    each."""
    given = typed("train", model="small-cnn", data=photos, val_data=photos, strategy="gutout-coarse", patch=5)
    for layer in ((), ("--gradcam-layer", "8")):
        run = tmp_path / f"run{len(layer)}"
        done = cli(*given, *layer, epochs=1, batch_size=8, precision="bf16-mixed", out=run)
        assert done.code == 0, done.err
        (epoch,) = read_lines(run / "epochs.jsonl")
        assert epoch["forward_equivalents"] == (4 + 3) * epoch["images"]
        assert read_manifest(run).stated["train"]["gradcam_layer"] == (layer[1] if layer else None)


def test_a_run_from_before_there_was_a_cheaper_search(cli, trained: Path, photos: Path, tmp_path: Path):
    """Its manifest says nothing of when and how precisely to search: it is a run of the defaults, and no
    other."""
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    manifest = read_manifest_file(trained / MANIFEST)
    for key in ("search_every", "search_precision"):
        assert manifest["experiment"]["train"].pop(key) is None
    (old / MANIFEST).write_text(json.dumps(manifest))
    again = typed("train", model="small-cnn", data=photos, val_data=photos, strategy="greedy-coarse", patch=5)
    again += typed(epochs=4, batch_size=8, lr=0.05, device="cpu", out=old, resume=True)
    for options in ((), ("--search-every", 1)):
        done = cli(*again, *options)
        assert done.code == 0, done.err
    assert "search_every: None there, 2 here" in cli(*again, "--search-every", 2).err
    assert "search_precision: None there" in cli(*again, "--search-precision", "bf16-mixed").err
    assert cli("certify", model=old, data=photos, patch=5, limit=3, out=tmp_path / "c").code == 0


def test_train_certify_predict_report(cli, photos: Path, tmp_path: Path):
    run, cert = tmp_path / "run", tmp_path / "cert"
    given = typed("train", model="small-cnn", data=photos, val_data=photos, strategy="greedy-multisize")
    done = cli(*given, patch=5, epochs=2, batch_size=8, lr=0.05, out=run, json=True)
    assert done.code == 0, done.err
    epochs = read_lines(run / "epochs.jsonl")
    assert [line["epoch"] for line in epochs] == [1, 2]
    # 25 passes of search and two copies of one forward and one backward pass (worth two) for each image.
    assert epochs[0]["forward_equivalents"] == (25 + 6) * epochs[0]["images"]
    assert (run / "model.safetensors").exists()
    assert not (run / "checkpoint.pt").exists()

    done = cli("certify", model=run, data=photos, patch=5, masks_per_axis=3, out=cert)
    assert done.code == 0, done.err
    assert "certified" in done.out
    records = read_records(cert)
    assert [record.index for record in records] == list(range(24))
    manifest = read_manifest(cert)
    assert manifest.certification.weights_sha256 == read_manifest(run).finished["weights_sha256"]
    assert manifest.finished["lines"] == 24

    summary = json.loads(cli("report", cert, "--json").out)[0]
    assert summary["certified_robust_accuracy"]["count"] == sum(record.certified for record in records)
    assert summary["clean_accuracy"]["count"] == sum(
        record.defended_label == record.label for record in records
    )
    assert summary["vanilla_accuracy"]["images"] == 24

    image = photos / "red" / "3.png"
    answer = json.loads(cli("predict", image, model=run, patch=5, masks_per_axis=3).out)
    (same,) = (record for record in records if record.name == "red/3.png")
    assert (answer["label"], answer["case"]) == (same.defended_label, same.case)
    assert answer["class"] == ["blue", "green", "red"][answer["label"]]


def test_min_margin_counts_fewer_certificates(cli, trained: Path, photos: Path, tmp_path: Path):
    cli("certify", model=trained, data=photos, patch=5, masks_per_axis=2, out=tmp_path / "c")
    margins = sorted(record.margin for record in read_records(tmp_path / "c") if record.certified)
    assert len(margins) > 2
    (summary,) = json.loads(cli("report", tmp_path / "c", "--min-margin", margins[1], "--json").out)
    assert summary["certified_robust_accuracy"]["count"] == len(margins) - 1
    refused = cli("report", tmp_path / "c", "--min-margin", "inf")
    assert (refused.code, "expected a number" in refused.err) == (2, True), refused.err
    assert cli("report", tmp_path / "c", "--min-margin", "nan").code == 2


def test_certificates_within_rounding_are_not_counted(cli, trained: Path, photos: Path, tmp_path: Path):
    """By default; --min-margin 0 counts all. The records stay what they are, and every reader agrees."""
    from tampering import forge, lines_of

    out = tmp_path / "c"
    done = cli("certify", model=trained, data=photos, patch=5, masks_per_axis=2, out=out)
    assert done.code == 0
    lines = lines_of(out)
    certificates = [line for line in lines if line["certified"]]
    for line, margin in zip(certificates[:3], (0.0, 9.99e-4, 1e-3), strict=True):
        line["margin"] = margin
    forge(out, lines)
    (raw,) = json.loads(cli("report", out, min_margin=0, json=True).out)
    (counted,) = json.loads(cli("report", out, json=True).out)
    assert raw["certified_robust_accuracy"]["count"] == len(certificates)
    assert (raw["min_margin"], raw["below_min_margin"]) == (0, 0)
    assert counted["certified_robust_accuracy"]["count"] == len(certificates) - 2
    assert (counted["min_margin"], counted["below_min_margin"]) == (1e-3, 2)
    said = " ".join(cli("report", out).out.split())
    assert "Not counted: 2 certificates" in said
    assert "--min-margin 0 counts all" in said
    assert "Not counted" not in cli("report", out, min_margin=0).out
    (checked,) = json.loads(cli("verify", out, json=True).out)
    assert (checked["certified"], checked["below"]) == (len(certificates) - 2, 2)
    page = tmp_path / "page.html"
    assert cli("report", out, html=page).code == 0
    assert "Not counted: 2 certificates" in page.read_text()


def test_a_timm_model_and_a_tar(cli, photos: Path, tmp_path: Path):
    """A timm network from random weights on a tar of class folders, at another image size than its own."""
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, arcname="photos")
    given = typed("train", model="test_efficientnet", data=tmp_path / "photos.tar", val_data=photos)
    given += typed(strategy="random-cutout", patch="3%", image_size=48, epochs=1, batch_size=8)
    done = cli(*given, out=tmp_path / "run")
    assert done.code == 0, done.err
    experiment = read_manifest(tmp_path / "run").stated
    assert experiment["masks"]["patch_size"] == [9, 9]
    assert experiment["model"]["crop_pct"] == 1.0  # small images keep their border


def test_every_kind_of_image_is_read(cli, trained: Path, photos: Path, tmp_path: Path):
    """Grey, RGBA, palette, 16-bit and 1x1 images are converted, not refused."""
    picture = Image.open(photos / "red" / "0.png")
    Image.new("I;16", (20, 30), 40_000).save(tmp_path / "16bit.png")
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("RGBA").save(tmp_path / "rgba.png")
    picture.convert("P").save(tmp_path / "palette.png")
    picture.resize((1, 1)).save(tmp_path / "1x1.png")
    files = sorted(tmp_path.glob("*.png"))
    done = cli("predict", *files, model=trained, patch=5, masks_per_axis=2)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == len(files) == 5


def test_16_bits_are_scaled_not_clipped():
    assert decode(Image.new("I;16", (2, 2), 257 * 100)).getpixel((0, 0)) == (100, 100, 100)


def test_limit_takes_images_of_every_class(cli, trained: Path, photos: Path, tmp_path: Path):
    cli("certify", model=trained, data=photos, patch=5, masks_per_axis=2, limit=6, out=tmp_path / "c")
    assert [record.label for record in read_records(tmp_path / "c")] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("command", ["masks", "train", "certify", "predict", "report", "demo"])
def test_help(cli, command: str):
    assert "--" in cli(command, "--help").out


def test_predict_as_certified(cli, trained: Path, photos: Path, tmp_path: Path):
    """The masks and the precision come from the certification, which must be of these weights."""
    folder, image = tmp_path / "certified", next(photos.glob("*/*.png"))
    given = typed("certify", model=trained, data=photos, patch="5x4", masks_per_axis=3)
    cli(*given, precision="bf16-mixed", out=folder)
    answer = json.loads(cli("predict", image, model=trained, certified=folder).out)
    assert (answer["patch_size"], answer["masks_per_axis"], answer["precision"]) == ([5, 4], 3, "bf16-mixed")

    for options in (["--patch", "5"], ["--masks-per-axis", 3], ["--precision", "32-true"]):
        assert cli("predict", image, *options, model=trained, certified=folder).code == 2
    assert "expected --certified FOLDER, or --patch" in cli("predict", image, model=trained).err
    assert "expected records of certify" in cli("predict", image, model=trained, certified=trained).err

    path = folder / "manifest.json"
    original = json.loads(path.read_text())
    for change, words in [
        ({"weights_sha256": "0" * 64}, "weights of sha256 000000000000... there"),
        ({"model": {**original["experiment"]["model"], "crop_pct": 0.5}}, "model.crop_pct: 0.5 there"),
        ({"masks": {**original["experiment"]["masks"], "windows": [[[0, 0, 1, 1]]]}}, "masks.windows"),
        ({"masks": {}}, "its manifest lacks 'image_size'"),
    ]:
        write_manifest(path, {**original, "experiment": {**original["experiment"], **change}})
        outcome = cli("predict", image, model=trained, certified=folder)
        assert (outcome.code, outcome.out) == (2, "")
        assert words in outcome.err
