"""On a GPU: the answers of the CPU. ``make test-gpu``; skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from certipatch.records.read import read_records
from inputs import typed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_certificates_are_those_of_the_cpu(cli, trained: Path, photos: Path, tmp_path: Path, precision: str):
    """Where the smallest margin is above rounding."""
    found = {}
    for device in ("cpu", "cuda"):
        given = typed("certify", model=trained, data=photos, patch=5, masks_per_axis=4, exhaustive=True)
        done = cli(*given, precision=precision, device=device, out=tmp_path / device)
        assert done.code == 0, done.err
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
    given = typed("train", model="small-cnn", data=photos, val_data=photos, strategy=strategy, patch=5)
    done = cli(*given, epochs=4, batch_size=8, lr=0.05, device="cuda", out=tmp_path / "run", json=True)
    assert done.code == 0, done.err
    right = json.loads(done.out)["validation_vanilla"]
    assert right["correct"] > right["images"] / 2
