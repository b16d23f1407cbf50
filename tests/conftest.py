"""Fixtures: the command line in this process, a folder of small images, a trained run.

They need neither the network nor ../shared.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from certipatch.models.build import build, describe
from certipatch.models.small import SMALL_CNN
from certipatch.runtime.devices import make_fabric
from certipatch.training.train import train
from inputs import typed, write_photos

# Assertions in modules that tests share say what is wrong, as those in tests do.
pytest.register_assert_rewrite("breakable", "defenses.contract", "processes", "tampering")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what starts processes first, so that at the end no worker waits long for the other."""
    items.sort(key=lambda item: item.path.stem not in ("test_distributed", "test_resume", "test_shards"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command as a user types it; its exit code, stdout and stderr.

    Options are words (``"--limit", 3``) or keywords (``limit=3``; ``json=True`` is ``--json``).
    """
    from certipatch.cli.app import main

    def call(*words: object, **options: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["certipatch", *map(str, typed(*words, **options))])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not make a silent command speak in a test that counts lines."""
    monkeypatch.setattr("certipatch.runtime.progress.FIRST_SECONDS", 3600)


@pytest.fixture
def blocks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``blocks_of(8)``: from now on ``certify`` examines 8 images together, and its manifest says so."""

    def call(images: int) -> None:
        for module in ("blocks", "experiment"):
            monkeypatch.setattr(f"certipatch.certification.{module}.BLOCK", images)

    return call


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes of 8 images, 32x32. Do not write into it."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A finished training run of small-cnn on ``photos``. Do not write into it."""
    from certipatch.data.load import load_source
    from certipatch.training.config import TrainConfig

    source = load_source(str(photos))
    spec = describe(SMALL_CNN, classes=source.classes, num_classes=3)
    config = TrainConfig(
        strategy="greedy-coarse", patch_size=(5, 5), masks_per_axis=6, epochs=4, batch_size=8, lr=0.05
    )
    out = tmp_path_factory.mktemp("runs") / "trained"
    train(build(spec), spec, source, source, config, out, fabric=make_fabric(device="cpu"))
    return out


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are computed fastest on one thread, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
