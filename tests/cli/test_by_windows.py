"""The defenses by windows from the command line, end to end: train on bands, certify, look, prove, attack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inputs import refused, typed, write_photos
from tampering import forge, lines_of

pytestmark = pytest.mark.usefixtures("one_thread")

DEFENSES = {
    "ds": {"windows": "columns:8", "theta": 0.3},
    "smoothed-vit": {"windows": "columns:8/2"},
    "patchguard": {"windows": "blocks:16/8"},
}


@pytest.fixture(scope="module")
def banded(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A run of small-cnn that was shown one band of each image at a time. Do not write into it."""
    from certipatch.data.load import load_source
    from certipatch.models.build import build, describe
    from certipatch.runtime.devices import make_fabric
    from certipatch.training.config import TrainConfig
    from certipatch.training.train import train

    source = load_source(str(photos))
    spec = describe("small-cnn", classes=source.classes, num_classes=3)
    config = TrainConfig(
        **{"strategy": "random-band", "windows": "columns:8", "patch_size": (5, 5), "masks_per_axis": 3},
        **{"epochs": 4, "batch_size": 8, "lr": 0.05},
    )
    out = tmp_path_factory.mktemp("runs") / "banded"
    train(build(spec), spec, source, source, config, out, fabric=make_fabric(device="cpu"))
    return out


@pytest.mark.parametrize("defense", DEFENSES)
def test_from_images_to_a_verified_attack(cli, banded: Path, photos: Path, tmp_path: Path, defense: str):
    out, attacked, page = tmp_path / "c", tmp_path / "a", tmp_path / "page.html"
    given = typed(model=banded, data=photos, device="cpu")
    asked = typed("certify", *given, patch="4,7", defense=defense, out=out, **DEFENSES[defense])
    done = cli(*asked, "--json")
    assert done.code == 0, done.err
    small, large = json.loads(done.out)
    assert small["defense"] == large["defense"] == defense
    assert small["patch_size_known"] == (defense == "patchguard")
    certified = [one["certified_robust_accuracy"]["count"] for one in (small, large)]
    assert 24 >= certified[0] >= certified[1] > 0

    assert cli(*asked).code == 2  # there is one
    before = [(out / each / "records.jsonl").read_bytes() for each in ("4x4", "7x7")]
    assert cli(*asked, "--resume").code == 0
    assert [(out / each / "records.jsonl").read_bytes() for each in ("4x4", "7x7")] == before
    alone = tmp_path / "alone"
    assert cli("certify", *given, patch=7, defense=defense, out=alone, **DEFENSES[defense]).code == 0
    assert (alone / "records.jsonl").read_bytes() == before[1], "the sizes share passes, not results"

    shown = cli("report", out, "--html", page, data=photos)
    assert shown.code == 0, shown.err
    assert f"defense: {defense}" in " ".join(shown.out.split())
    assert "one window of the image at a time" in page.read_text()
    assert cli("verify", alone, *given, "--all").code == 0

    image = photos / "red" / "0.png"
    plain = json.loads(cli("predict", image, certified=alone, model=banded, device="cpu").out)
    assert (plain["class"], plain["defense"], plain["patch_size"]) == ("red", defense, [7, 7])
    proven = json.loads(cli("predict", image, "--prove", certified=alone, model=banded, device="cpu").out)
    line = next(line for line in lines_of(alone) if line["name"] == "red/0.png")
    assert (proven["slack"], proven["unchangeable"]) == (line["slack"], line["certified"])

    done = cli("attack", *given, records=alone, limit=6, restarts=4, steps=2, out=attacked, json=True)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["certified_broken"] == 0
    assert found["attempts_on_certified"] > 0
    assert cli("verify", attacked, *given, "--all", records=alone).code == 0
    assert cli("report", alone, attacked, "--html", page, data=photos).code == 0


def test_shards_are_the_same_records(cli, banded: Path, photos: Path, tmp_path: Path, blocks_of):
    blocks_of(8)
    asked = typed("certify", model=banded, data=photos, patch="4,7", defense="ds", windows="columns:8")
    assert cli(*asked, device="cpu", out=tmp_path / "whole").code == 0
    for part in ("2/2", "1/2"):
        assert cli(*asked, device="cpu", out=tmp_path / "parts", shard=part).code == 0
    for size in ("4x4", "7x7"):
        whole = lines_of(tmp_path / "whole" / size)
        files = [tmp_path / "parts" / size / f"records-{i}-of-2.jsonl" for i in (1, 2)]
        parts = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        assert sorted(parts, key=lambda line: line["index"]) == whole


def test_an_unreadable_image_has_a_record_of_its_own(cli, banded: Path, tmp_path: Path):
    photos = write_photos(tmp_path / "photos", each=2)
    (photos / "red" / "0.png").write_bytes(b"")
    given = typed(model=banded, data=photos, device="cpu")
    assert cli("certify", *given, patch=4, defense="ds", windows="columns:8", out=tmp_path / "c").code == 0
    lines = lines_of(tmp_path / "c")
    (unreadable,) = (line for line in lines if line["error"])
    assert [unreadable[name] for name in ("slack", "weakest", "rival", "margin")] == [None] * 4
    assert cli("verify", tmp_path / "c", *given, "--all").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"defense": "ds"}, ["expected --windows with it", "columns:4"]),
        ({"defense": "ds", "windows": "columns:4", "theta": 1.01}, ["theta 1.01", "from 0 to 1"]),
        ({"defense": "ds", "windows": "columns:4", "theta": "nan"}, ["theta nan", "from 0 to 1"]),
        ({"defense": "ds", "windows": "columns:33"}, ["windows columns:33", "1 to 32 pixels"]),
        ({"defense": "ds", "windows": "columns:4/5"}, ["columns:4/5", "no window shows"]),
        ({"defense": "ds", "windows": "rows:4"}, ["windows 'rows:4'", "columns:4"]),
        ({"defense": "ds", "windows": "columns:4", "places": True}, ["has no --places"]),
        ({"defense": "ds", "windows": "columns:4", "tokens": "dropped"}, ["has no --tokens"]),
        ({"defense": "ds", "windows": "columns:4", "masks_per_axis": 3}, ["drop --masks-per-axis"]),
        ({"defense": "patchguard", "windows": "columns:4", "theta": 0.3}, ["has no --theta"]),
        ({"windows": "columns:4"}, ["'patchcleanser': has no --windows"]),
        ({"defense": "smoothed-vit", "windows": "columns:4", "tokens": "dropped"}, ["without tokens"]),
        ({"defense": "smoothed-vit", "windows": "columns:4", "tokens": "lost"}, ["dropped or filled"]),
        ({"defense": "dss", "windows": "columns:4"}, ["defense 'dss'", "smoothed-vit"]),
    ],
)
def test_bad_input_is_one_line(cli, banded: Path, photos: Path, tmp_path: Path, options, words):
    out = tmp_path / "out"
    done = cli("certify", model=banded, data=photos, patch=5, device="cpu", out=out, **options)
    refused(done, *words)
    assert not out.exists()


@pytest.fixture(scope="module")
def folder(banded: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from certipatch import certify

    out = tmp_path_factory.mktemp("c") / "ds"
    certify(banded, photos, out, patch="5", defense="ds", windows="columns:8", device="cpu")
    return out


class TestFoldersOfOtherDefenses:
    def test_what_needs_masks_refuses_one_without(self, cli, folder: Path, banded: Path, photos: Path):
        words = ["expected a certification of patchcleanser", "found one of ds"]
        refused(cli("serve", model=banded, certified=folder), *words)
        refused(cli("bench", model=banded, data=photos, certified=folder), *words)

    def test_another_defense_is_not_resumed(self, cli, folder: Path, banded: Path, photos: Path):
        asked = typed("certify", "--resume", model=banded, data=photos, patch=5, device="cpu", out=folder)
        refused(cli(*asked, defense="smoothed-vit", windows="columns:8"), "defense: 'ds' there")
        refused(cli(*asked, defense="ds", windows="columns:9"), "windows: 'columns:8' there")
        refused(cli(*asked, defense="ds", windows="columns:8", theta=0.9), "theta: 0.2 there")

    def test_places_are_not_proven(self, cli, folder: Path, banded: Path, photos: Path):
        asked = typed("predict", photos / "red" / "0.png", "--prove", "--places", device="cpu")
        refused(cli(*asked, model=banded, certified=folder), "--places", "patchcleanser", "found ds")

    def test_python_takes_it_too(self, folder: Path, banded: Path):
        import torch

        import certipatch as cp

        defense = cp.load_defense(banded, folder, device="cpu")
        images = torch.rand(2, 3, 32, 32)
        assert defense.predict(images).shape == (2,)
        assert [one.passes for one in defense.certify(images, torch.tensor([0, 1]))] == [33, 33]
        assert defense.threat.patch_size == (5, 5)


def test_a_transformer_drops_tokens_and_verify_does_so_too(cli, tmp_path: Path):
    """Trained on bands and certified without the tokens that show nothing; who says that they were filled is
    found out."""
    photos = write_photos(tmp_path / "photos", each=4, size=64)
    run, out = tmp_path / "run", tmp_path / "c"
    trained = cli(
        *typed("train", model="test_vit", image_size=64, data=photos, val_data=photos, patch=4, device="cpu"),
        *typed(strategy="random-band", windows="columns:20/5", epochs=6, lr=0.02, batch_size=4, out=run),
    )
    assert trained.code == 0, trained.err
    given = typed(model=run, data=photos, device="cpu")
    done = cli("certify", *given, patch=4, defense="smoothed-vit", windows="columns:20/5", out=out)
    assert done.code == 0, done.err
    manifest, lines = json.loads((out / "manifest.json").read_text()), lines_of(out)
    assert manifest["experiment"]["tokens"] == "dropped"
    assert cli("verify", out, *given, "--all").code == 0
    filled = {**manifest, "experiment": {**manifest["experiment"], "tokens": "filled"}}
    forge(out, lines, filled)
    found = cli("verify", out, *given, "--all")
    assert found.code == 1
    assert "slack" in found.out


def test_crosscert_is_a_join_of_two_folders(cli, banded: Path, photos: Path, tmp_path: Path):
    """PatchCleanser answers, and a warning is where the windows answer otherwise; counted here by hand."""
    given = typed(model=banded, data=photos, device="cpu")
    masks, windows, other = tmp_path / "pc", tmp_path / "ds", tmp_path / "other"
    assert cli("certify", *given, patch=7, masks_per_axis=3, out=masks).code == 0
    assert cli("certify", *given, patch=7, defense="ds", windows="columns:10", out=windows).code == 0
    assert cli("certify", *given, patch=9, defense="ds", windows="columns:8", out=other).code == 0
    pairs = list(zip(lines_of(masks), lines_of(windows), strict=True))

    def held(line) -> bool:
        return line["certified"] and line["margin"] >= 1e-3

    both = sum(held(one) and held(two) for one, two in pairs)
    either = sum(held(one) or held(two) for one, two in pairs)
    quiet = sum(one["defended_label"] == two["defended_label"] == one["label"] for one, two in pairs)
    assert both < either
    (line,) = (one for one in cli("report", masks, windows, other).out.splitlines() if "CrossCert" in one)
    words = [f"{masks} with a warning where {windows}", f"right without a warning {100 * quiet / 24:.1f} %"]
    words += [f"under every patch, proven, {100 * both / 24:.1f} % ({both}/24"]
    words += [f"right or with a warning under every patch, proven, {100 * either / 24:.1f} % ({either}/24"]
    for word in words:
        assert word in line
    assert "CrossCert" not in cli("report", masks, other).out, "they are against other patches"
    assert "CrossCert" not in cli("report", windows, other).out


class TestTraining:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"strategy": "greedy-fine", "windows": "columns:4"}, ["windows columns:4", "random-band"]),
            ({"strategy": "random-band", "windows": "columns:64"}, ["1 to 32 pixels"]),
            ({"strategy": "random-band", "windows": "bands"}, ["windows 'bands'"]),
            ({"strategy": "random-band", "search_every": 2}, ["searches", "random-band"]),
        ],
    )
    def test_bad_input_is_one_line(self, cli, photos: Path, tmp_path: Path, options, words):
        asked = typed("train", model="small-cnn", data=photos, val_data=photos, patch=5, device="cpu")
        refused(cli(*asked, out=tmp_path / "run", **options), *words)
        assert not (tmp_path / "run").exists()

    def test_windows_are_part_of_the_experiment(self, cli, banded: Path):
        manifest = json.loads((banded / "manifest.json").read_text())
        assert manifest["experiment"]["train"]["windows"] == "columns:8"
        assert 'windows = "columns:8"' in cli("train", "--like", banded).out
