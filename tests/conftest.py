"""Fixtures: the command line in this process, a folder of small images, a trained run. No network, no ../shared."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from certipatch.seals import seal

SHARED = Path(__file__).parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes comes first, so that at the end no worker waits long for the other."""
    items.sort(key=lambda item: item.path.stem not in ("test_distributed", "test_resume", "test_shards"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``cli("certify", "--model", ...)`` as a user types it: exit code, stdout, stderr."""
    from certipatch.cli import main

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["certipatch", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest as a forger would: with its hash mended."""
    path.write_text(json.dumps(seal(manifest)))


def write_photos(folder: Path, classes: tuple[str, ...] = ("blue", "green", "red"), each: int = 8, size: int = 32) -> Path:
    """A data set that a small network learns: noisy images, each with the colour of its class."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., 2 - label % 3] += 100
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes of 8 images, 32x32. Do not write into it."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A finished training run of small-cnn on ``photos``. Do not write into it."""
    from certipatch import models, runtime, training
    from certipatch.config import TrainConfig
    from certipatch.data import load_source

    source = load_source(str(photos))
    spec = models.describe(models.SMALL_CNN, classes=source.classes, num_classes=3)
    config = TrainConfig(strategy="greedy-coarse", patch_size=(5, 5), masks_per_axis=6, epochs=4, batch_size=8, lr=0.05)
    out = tmp_path_factory.mktemp("runs") / "trained"
    training.train(models.build(spec), spec, source, source, config, out, fabric=runtime.fabric(device="cpu"))
    return out


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are computed fastest on one thread, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
