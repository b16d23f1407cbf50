"""From a training run and a folder of ``certify`` back to the defended model, as a service of one's own has
it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import certipatch as cp
from certipatch.certification.restore import load_defense
from certipatch.data.load import load_source
from certipatch.data.source import Images, as_float
from certipatch.errors import ConfigError, RecordsError
from certipatch.models.runs import open_run
from certipatch.records.read import read_records
from inputs import typed, write_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"patch": 8},
    "challenger": {"patch": 8, "inference": "challenger"},
    "shapes": {"patch": "9x4+4x9"},
    "two": {"patch": 3, "patches": 2},
    "bf16": {"patch": "8x7", "precision": "bf16-mixed"},
    "prefix": {"patch": 8, "shared_prefix": True},
}


@pytest.fixture
def certified(cli, trained: Path, photos: Path, tmp_path: Path):
    def call(**options: object) -> Path:
        done = cli("certify", model=trained, data=photos, masks_per_axis=2, out=tmp_path / "c", **options)
        assert done.code == 0, done.err
        return tmp_path / "c"

    return call


@pytest.mark.parametrize("way", WAYS)
def test_it_answers_what_predict_answers(cli, certified, trained: Path, photos: Path, way: str):
    folder = certified(**WAYS[way])
    defense = cp.load_defense(trained, folder)
    assert isinstance(defense, cp.PatchCleanser)
    images = Images(load_source(str(photos)), open_run(trained).spec)
    some = [*range(0, 24, 5), 23]
    device = next(defense.model.parameters()).device
    pixels = as_float(torch.stack([images[index].readable() for index in some])).to(device)
    done = cli("predict", *(photos / images[index].name for index in some), model=trained, certified=folder)
    assert done.code == 0, done.err
    for image, line in zip(pixels, map(json.loads, done.out.splitlines()), strict=True):
        (verdict,) = defense.examine(image[None])
        found = verdict.defended_label, verdict.case, verdict.vanilla_label, verdict.margin
        assert found == (line["label"], line["case"], line["vanilla_label"], line["margin"])
        assert defense.predict(image[None]).item() == line["label"]
        assert defense.threat.keywords.keys() == line.keys() & {"patch_size", "other_patch_sizes", "patches"}
        assert defense.network.precision == line["precision"]
        assert defense.inference == line["inference"]


def test_it_certifies_what_was_certified(certified, trained: Path, photos: Path):
    folder = certified(patch=8, exhaustive=True)
    defense = cp.load_defense(str(trained), str(folder), device="cpu")
    images = Images(load_source(str(photos)), open_run(trained).spec)
    items = [images[index] for index in range(24)]
    pixels = as_float(torch.stack([item.readable() for item in items]))
    verdicts = defense.certify(pixels, torch.tensor([item.label for item in items]))
    for verdict, record in zip(verdicts, read_records(folder), strict=True):
        assert (verdict.certified, verdict.passes) == (record.certified, record.passes)
        assert verdict.margin == pytest.approx(record.margin, abs=1e-4)


def test_it_is_public():
    assert "load_defense" in cp.__all__
    assert cp.load_defense is load_defense


class TestRefusals:
    def test_another_run(self, certified, trained: Path, tmp_path: Path):
        folder, other = certified(patch=8), tmp_path / "other"
        shutil.copytree(trained, other)
        state = safetensors.torch.load_file(trained / "model.safetensors")
        safetensors.torch.save_file(state | {"13.bias": torch.zeros(3)}, other / "model.safetensors")
        with pytest.raises(cp.SoundnessError, match="is not the one that was trained"):
            load_defense(other, folder)

    def test_a_certification_of_another_model(self, certified, trained: Path):
        folder = certified(patch=8)
        path = folder / "manifest.json"
        whole = json.loads(path.read_text())
        for change, words in [
            ({"weights_sha256": "0" * 64}, "weights of sha256 000000000000... there"),
            ({"model": {**whole["experiment"]["model"], "crop_pct": 0.5}}, "model.crop_pct: 0.5 there"),
            ({"masks": {**whole["experiment"]["masks"], "windows": [[[0, 0, 1, 1]]]}}, "masks.windows"),
            ({"masks": {**whole["experiment"]["masks"], "image_size": [64, 64]}}, "images of"),
        ]:
            write_manifest(path, {**whole, "experiment": {**whole["experiment"], **change}})
            with pytest.raises(cp.SoundnessError, match="certify this one") as refused:
                load_defense(trained, folder)
            assert words in str(refused.value)
            assert "\n" not in str(refused.value)

    def test_a_folder_of_another_kind(self, cli, certified, trained: Path, photos: Path, tmp_path: Path):
        folder, given = certified(patch=8), typed(model=trained, data=photos)
        detected, attacked = tmp_path / "detected", tmp_path / "attacked"
        cli("detect", *given, patch=8, masks_per_axis=2, limit=3, out=detected)
        cli("attack", *given, records=folder, limit=3, steps=1, restarts=1, out=attacked)
        for other, kind in [(detected, "detect"), (attacked, "attack"), (trained, "train")]:
            with pytest.raises(ConfigError, match=f"expected records of certify, found those of {kind}"):
                load_defense(trained, other)
        with pytest.raises(RecordsError, match="expected a training run, found records of certify"):
            load_defense(folder, folder)
        with pytest.raises(RecordsError, match=r"expected a folder with manifest\.json"):
            load_defense(trained, tmp_path / "nothing")

    def test_an_unknown_device(self, certified, trained: Path):
        folder = certified(patch=8)
        with pytest.raises(ConfigError, match="abacus"):
            load_defense(trained, folder, device="abacus")

    def test_a_certification_of_another_defense(
        self, cli, certified, trained: Path, photos: Path, tmp_path: Path
    ):
        """What answers by PatchCleanser, or attacks it, takes no other defense for it."""
        folder = certified(patch=8)
        path = folder / "manifest.json"
        whole = json.loads(path.read_text())
        write_manifest(path, {**whole, "experiment": {**whole["experiment"], "defense": "prayer"}})
        any_known = "patchguard, clipped-bagnet, bagcert or patchcure-srf, found one of prayer"
        with pytest.raises(ConfigError, match=any_known):
            load_defense(trained, folder)
        for line, words in (
            (typed("predict", photos / "red" / "0.png", model=trained, certified=folder), any_known),
            (typed("attack", model=trained, data=photos, records=folder, out=tmp_path / "a"), any_known),
            (
                typed("bench", model=trained, data=photos, certified=folder),
                "patchcleanser, found one of prayer",
            ),
            (typed("serve", model=trained, certified=folder), "patchcleanser, found one of prayer"),
        ):
            refused = cli(*line)
            assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1), refused.err
            assert words in refused.err
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("fill", [[0.25, 0.25, 0.25], [0.5, 0.5, 0.5 + 1 / 255], [0.0, 0.0, 0.0]])
def test_a_fill_that_is_not_the_models_is_refused(certified, trained: Path, fill: list[float]):
    """The masks would be filled with another colour than was certified."""
    folder = certified(patch=8)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["experiment"]["fill"] != fill
    manifest["experiment"]["fill"] = fill
    write_manifest(folder / "manifest.json", manifest)
    with pytest.raises(cp.errors.SoundnessError, match=r"is of another defense than this model's \(fill"):
        cp.load_defense(trained, folder)
