"""On a GPU: the answers of the CPU. ``make test-gpu``; skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from certipatch.records.read import read_records

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_certificates_are_those_of_the_cpu(cli, trained: Path, photos: Path, tmp_path: Path, precision: str):
    """Where the smallest margin is above rounding."""
    found = {}
    for device in ("cpu", "cuda"):
        options = [
            "--patch",
            5,
            "--masks-per-axis",
            4,
            "--exhaustive",
            "--precision",
            precision,
            "--device",
            device,
        ]
        assert (
            cli("certify", "--model", trained, "--data", photos, *options, "--out", tmp_path / device).code
            == 0
        )
        found[device] = read_records(tmp_path / device)
    threshold = 1e-3 if precision == "32-true" else 0.1
    clear = [
        (a, b)
        for a, b in zip(found["cpu"], found["cuda"], strict=True)
        if min(a.margin or 0, b.margin or 0) > threshold
    ]
    assert len(clear) > 5
    assert all(
        (a.certified, a.defended_label, a.case) == (b.certified, b.defended_label, b.case) for a, b in clear
    )


@pytest.mark.parametrize("strategy", ["gutout-both", "greedy-multisize"])
def test_training(cli, photos: Path, tmp_path: Path, strategy: str):
    options = [
        "--model",
        "small-cnn",
        "--data",
        photos,
        "--val-data",
        photos,
        "--strategy",
        strategy,
        "--patch",
        5,
        "--epochs",
        4,
    ]
    done = cli(
        "train",
        *options,
        "--batch-size",
        8,
        "--lr",
        0.05,
        "--device",
        "cuda",
        "--out",
        tmp_path / "run",
        "--json",
    )
    assert done.code == 0, done.err
    right = json.loads(done.out)["validation_vanilla"]
    assert right["correct"] > right["images"] / 2
