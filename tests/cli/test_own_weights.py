"""Weights from elsewhere on the command line: which class an output means, and what a model is called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch

from certipatch.records.read import read_records
from inputs import refused

GEOMETRY = {"patch": 5, "masks_per_axis": 2}


def renamed(photos: Path, folder: Path, names: tuple[str, str, str]) -> Path:
    """The photographs blue, green and red under other names, in that order."""
    for old, new in zip(("blue", "green", "red"), names, strict=True):
        shutil.copytree(photos / old, folder / new)
    return folder


@pytest.mark.parametrize("command", ["certify", "detect", "bench"])
@pytest.mark.parametrize(
    "names", [("Zebra", "apple", "mango"), ("1", "10", "2"), ("B", "a", "c"), ("a10", "a11", "a9")]
)
def test_class_folders_that_others_number_otherwise_are_refused(
    cli, trained: Path, photos: Path, tmp_path: Path, command: str, names: tuple[str, str, str]
):
    """The names are in torchvision's order; timm's is another."""
    data, weights = renamed(photos, tmp_path / "data", names), trained / "model.safetensors"
    out = {"out": tmp_path / "c"} if command != "bench" else {}
    done = cli(command, model="small-cnn", weights=weights, data=data, **GEOMETRY, **out)
    refused(done, f"torchvision sorts by code point ({', '.join(names)})", "timm naturally", "--class-map")
    assert ", ".join(names) in done.err
    assert not (tmp_path / "c").exists()


def test_a_class_map_says_what_the_outputs_mean(cli, trained: Path, photos: Path, tmp_path: Path):
    names = ("Zebra", "apple", "mango")
    data = renamed(photos, tmp_path / "data", names)
    (tmp_path / "map.txt").write_text("\n".join(names))
    given = {"model": "small-cnn", "weights": trained / "model.safetensors", **GEOMETRY}
    done = cli("certify", data=data, class_map=tmp_path / "map.txt", **given, out=tmp_path / "c")
    assert done.code == 0, done.err
    assert cli("certify", data=photos, **given, out=tmp_path / "same").code == 0
    found, expected = read_records(tmp_path / "c"), read_records(tmp_path / "same")
    labels = {record.name.partition("/")[0]: record.label for record in found}
    assert labels == dict(zip(names, range(3), strict=True))
    assert sorted((r.label, r.certified) for r in found) == sorted((r.label, r.certified) for r in expected)


@pytest.mark.parametrize("names", [("a", "b", "c"), ("n01440764", "n01443537", "n02102040"), ("1", "2", "3")])
def test_class_folders_of_one_order_need_no_map(
    cli, trained: Path, photos: Path, tmp_path: Path, names: tuple[str, str, str]
):
    data, weights = renamed(photos, tmp_path / "data", names), trained / "model.safetensors"
    done = cli(
        "certify", model="small-cnn", weights=weights, data=data, **GEOMETRY, limit=3, out=tmp_path / "c"
    )
    assert done.code == 0, done.err


def test_a_run_of_ones_own_knows_its_classes(cli, photos: Path, tmp_path: Path):
    data = renamed(photos, tmp_path / "data", ("Zebra", "apple", "mango"))
    run, given = tmp_path / "run", {"data": data, **GEOMETRY}
    done = cli("train", model="small-cnn", val_data=data, strategy="vanilla", epochs=1, out=run, **given)
    assert done.code == 0, done.err
    done = cli("certify", model=run, limit=3, out=tmp_path / "c", **given)
    assert done.code == 0, done.err


def test_averaged_weights_are_said_to_be_taken(cli, trained: Path, photos: Path, tmp_path: Path):
    import torch

    good = safetensors.torch.load_file(trained / "model.safetensors")
    bad = {key: value + 1 for key, value in good.items()}
    torch.save({"state_dict": bad, "state_dict_ema": good}, tmp_path / "w.pth")
    given = {"model": "small-cnn", "data": photos, **GEOMETRY}
    done = cli("certify", weights=tmp_path / "w.pth", out=tmp_path / "c", **given)
    assert done.code == 0, done.err
    assert "the averaged ones are taken, state_dict_ema and not state_dict" in done.err
    cli("certify", weights=trained / "model.safetensors", out=tmp_path / "same", **given)
    assert read_records(tmp_path / "c") == read_records(tmp_path / "same")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf-hub:timm/resnet18.a1_in1k@v2", "cannot be fetched from the hub"),
        ("hf-hub:somebody/resnet18-of-mine", "--weights FILE"),
        ("https://huggingface.co/somebody/mine", "type --model hf-hub:somebody/mine"),
        ("HF-HUB:somebody/resnet18-of-mine", "type --model hf-hub:somebody/resnet18-of-mine"),
    ],
)
@pytest.mark.parametrize("command", ["certify", "train"])
def test_an_address_on_a_hub_is_told_what_to_type(
    cli, photos: Path, tmp_path: Path, command: str, name: str, words: str
):
    given = {"strategy": "vanilla", "val_data": photos} if command == "train" else {}
    done = cli(command, model=name, data=photos, **GEOMETRY, **given, out=tmp_path / "c")
    refused(done, name, words)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("command", ["certify", "train"])
def test_a_size_that_the_network_does_not_take(cli, photos: Path, tmp_path: Path, command: str):
    import timm

    weights = tmp_path / "w.safetensors"
    safetensors.torch.save_file(
        timm.create_model("test_vit", num_classes=3, img_size=100).state_dict(), weights
    )
    given = {"strategy": "vanilla", "val_data": photos} if command == "train" else {}
    done = cli(
        command, model="test_vit", weights=weights, image_size=100, data=photos, **GEOMETRY, **given,
        out=tmp_path / "c",
    )  # fmt: skip
    refused(done, "test_vit", "100x100", "divisible by patch size", "--image-size")
