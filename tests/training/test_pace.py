"""What makes a training step as fast as a plain loop: nothing in it waits for the device, few open files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from certipatch.data.load import load_source
from certipatch.data.source import Item, stack
from certipatch.errors import SoundnessError
from certipatch.geometry.masks import MaskSet
from certipatch.models.build import build, describe
from certipatch.models.small import SMALL_CNN, Normalize
from certipatch.records.manifest import read_manifest
from certipatch.records.read import read_lines
from certipatch.runtime.devices import make_fabric
from certipatch.training import loop
from certipatch.training.config import TrainConfig, train_config
from certipatch.training.counts import Unseen
from certipatch.training.masking import Masking
from certipatch.training.strategies import STRATEGIES
from certipatch.training.train import train
from inputs import typed, write_photos

pytestmark = pytest.mark.usefixtures("one_thread")


def run(photos: Path, out: Path, **options: object) -> None:
    source = load_source(str(photos))
    spec = describe(SMALL_CNN, classes=source.classes, num_classes=3)
    asked = {"patch_size": (5, 5), "masks_per_axis": 6, "epochs": 1, "batch_size": 4, **options}
    train(build(spec), spec, source, source, train_config(**asked), out, fabric=make_fabric(device="cpu"))


class Waits(TorchDispatchMode):
    """Counts what makes Python wait for a device: a number or a bool that is taken out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch):
    """Counts also those that no operation of torch shows."""
    waits = Waits()
    with monkeypatch.context() as patch:
        for name in ("tolist", "cpu", "numpy"):
            plain = getattr(torch.Tensor, name)

            def watched(tensor: torch.Tensor, *args: object, plain: Callable = plain) -> object:
                waits.count += 1
                return plain(tensor, *args)

            patch.setattr(torch.Tensor, name, watched)
        with waits:
            yield waits


def test_waits_are_counted(monkeypatch: pytest.MonkeyPatch):
    with counted(monkeypatch) as waits:
        one = torch.ones(3)
        float(one[0]), bool(one.all()), one.tolist(), int(one.sum()), one.sum().item()
    assert waits.count == 5


@pytest.mark.parametrize(
    ("strategy", "searching"), [("random-cutout", 0), ("greedy-multisize", 1), ("grid-coarse", 1)]
)
def test_no_step_waits_for_the_device(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, searching: int
):
    """None in a gradient step and in the bookkeeping, one in a search."""
    found: dict[str, list[int]] = {"search": [], "step": [], "add": []}

    def watch(place: object, name: str, kind: str) -> None:
        plain = getattr(place, name)

        def watched(*args: object, **options: object) -> object:
            with counted(monkeypatch) as waits:
                made = plain(*args, **options)
            found[kind].append(waits.count)
            return made

        monkeypatch.setattr(place, name, watched)

    watch(Masking, "__call__", "search")
    watch(loop, "_step", "step")
    watch(Unseen, "add", "add")
    run(photos, tmp_path / "run", strategy=strategy)
    assert found == {"search": [searching] * 6, "step": [0] * 6, "add": [0] * 6}


def test_an_accelerator_is_looked_at_now_and_then(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The counts of an epoch do not depend on when they were looked at."""
    run(photos, tmp_path / "each", strategy="random-cutout", batch_size=2)
    looks, look = [], Unseen.look
    fabric = make_fabric(device="cpu")
    unseen = Unseen(fabric)
    monkeypatch.setattr(type(fabric), "device", torch.device("meta"))
    due = [number for number in range(1, 51) if unseen.due(number, 50)]
    assert due == [1, 2, 4, 8, 16, 32, 48, 50]
    monkeypatch.undo()
    monkeypatch.setattr(Unseen, "due", lambda _, number, last: number in (5, last))
    monkeypatch.setattr(Unseen, "look", lambda self, **asked: looks.append(1) or look(self, **asked))
    run(photos, tmp_path / "seldom", strategy="random-cutout", batch_size=2)
    assert len(looks) == 2
    lines = [read_lines(tmp_path / name / "epochs.jsonl")[0] for name in ("each", "seldom")]
    assert [{**line, "seconds": 0} for line in lines] == [{**lines[0], "seconds": 0}] * 2
    weights = [read_manifest(tmp_path / n).finished["weights_sha256"] for n in ("each", "seldom")]
    assert weights[0] == weights[1]


def test_a_loss_that_nobody_looked_at_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By the step that it was in, and before anything is saved."""
    monkeypatch.setattr(Unseen, "due", lambda _, number, last: number == last)
    with pytest.raises(SoundnessError, match=r"loss: .* epoch 1, step [23];"):
        run(photos, tmp_path / "run", strategy="vanilla", lr=1e30)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert read_lines(tmp_path / "run" / "epochs.jsonl") == []


@pytest.mark.parametrize("strategy", ["greedy-coarse", "grid-coarse", "greedy-multisize"])
def test_a_search_refuses_logits_that_are_not_finite(strategy: str):
    """Of any pass; the second one here."""

    class Sometimes(torch.nn.Module):
        seen = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return x.mean(dim=(2, 3)) + (torch.inf if self.seen == 2 else 0)

    masks = MaskSet.covering(image_size=(32, 32), patch_size=(3, 3), masks_per_axis=6)
    images, labels = torch.rand(64, 3, 32, 32), torch.zeros(64, dtype=torch.int64)
    with pytest.raises(SoundnessError, match="finite logits"):
        STRATEGIES[strategy](Sometimes(), images, labels, masks, fill=0.5)


@pytest.mark.parametrize(
    ("most", "passes"),
    [
        (10**6, [8 * 9, 8 * 4, 8 * 8, 8 * 4]),  # of 8 images, so few passes
        (50, [36, 36, 32, 32, 32, 32]),  # and none that is nearly empty
        (None, [72, 32, 64, 32]),  # 512 at once of so small images where nothing was tried
    ],
)
def test_a_search_has_few_large_passes(monkeypatch: pytest.MonkeyPatch, most: int | None, passes: list[int]):
    """The 9 + 4 + 8 + 4 views of an image, for all images at once, and with the same masks."""
    config = train_config(strategy="greedy-multisize", patch_size=(3, 3), masks_per_axis=6)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        Normalize((0.5,) * 3, (0.2,) * 3), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3))
    )
    masks = MaskSet.covering(image_size=(32, 32), patch_size=(3, 3), masks_per_axis=6)
    items = [
        Item(i, str(i), i % 3, torch.randint(256, (3, 32, 32), dtype=torch.uint8), None) for i in range(8)
    ]
    fabric = make_fabric(device="cpu")
    expected = Masking(model, masks, config, fabric, 8)(stack(items), 0, seed=0)
    masking, seen = Masking(model, masks, config, fabric, 8), []
    monkeypatch.setattr(Masking, "_views_at_once", lambda _: most)
    masking.prepare(False)
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    views, labels, searched = masking(stack(items), 0, seed=0)
    assert seen == passes
    assert searched == sum(passes) == 8 * 25
    assert torch.equal(views, expected[0])
    assert torch.equal(labels, expected[1])


def test_an_accelerator_tries_how_many_views_a_pass_shall_have(monkeypatch: pytest.MonkeyPatch):
    fabric, model = make_fabric(device="cpu"), torch.nn.Sequential(Normalize((0.5,) * 3, (0.2,) * 3))
    masks = MaskSet.covering(image_size=(32, 32), patch_size=(3, 3), masks_per_axis=6)
    config = train_config(strategy="greedy-multisize", patch_size=(3, 3), masks_per_axis=6)
    masking = Masking(model.train(), masks, config, fabric, 8)
    assert masking._views_at_once() is None

    def tried(model: torch.nn.Module, *_: object) -> int:
        assert not model.training
        return 192

    monkeypatch.setattr("certipatch.training.masking.fastest_batch_size", tried)
    monkeypatch.setattr(type(fabric), "device", torch.device("meta"))
    masking.prepare(False)
    assert masking.look.batch_size == 192
    assert model.training


OPEN_FILES = """
import json, os, resource, sys, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
most, over = 0, threading.Event()
def watch():
    global most
    while not over.wait(0.002):
        most = max(most, len(os.listdir("/proc/self/fd")))
from certipatch.cli.app import main
threading.Thread(target=watch, daemon=True).start()
sys.argv = ["certipatch", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps({"most": most}))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux shows them")
def test_few_files_are_open(tmp_path: Path):
    """An image each needed a file: 1,024 of them, the usual limit, ended in "received 0 items of ancdata"."""
    data = write_photos(tmp_path / "photos", each=430, size=8)  # five batches
    words = typed("train", model="small-cnn", data=data, val_data=data, strategy="vanilla", patch=1)
    words += typed(epochs=1, batch_size=256, workers=16, out=tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", OPEN_FILES, *map(str, words)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert 60 < json.loads(done.stdout.splitlines()[-1])["most"] < 256


def test_workers_change_nothing(cli, photos: Path, tmp_path: Path):
    """Nor do they hide which image could not be read."""
    options = typed("train", model="small-cnn", data=photos, val_data=photos, strategy="random-cutout")
    options += typed(patch=5, epochs=2, batch_size=8, augment="flip,crop")
    for workers in (0, 2):
        assert cli(*options, workers=workers, out=tmp_path / str(workers)).code == 0
    found = [read_manifest(tmp_path / name).finished["weights_sha256"] for name in "02"]
    assert found[0] == found[1]
    damaged = write_photos(tmp_path / "damaged")
    (damaged / "green" / "5.png").write_bytes(b"no picture")
    options = typed("train", model="small-cnn", data=damaged, val_data=photos, strategy="vanilla", patch=5)
    for workers in (0, 2):
        done = cli(*options, workers=workers, batch_size=8, out=tmp_path / f"damaged{workers}")
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert "green/5.png cannot be read" in done.err


def test_a_compiled_step_is_stated():
    asked = {"strategy": "vanilla", "patch_size": (5, 5), "masks_per_axis": 6}
    assert TrainConfig(**asked, compile_step=False) == TrainConfig(**asked)
    assert TrainConfig(**asked, compile_step=True).model_dump()["compile_step"] is True


@pytest.mark.slow
def test_a_compiled_step_trains(photos: Path, tmp_path: Path):
    for name, choice in (("plain", None), ("compiled", True)):
        run(photos, tmp_path / name, strategy="random-cutout", compile_step=choice, lr=0.05, epochs=3)
    losses = [
        [line["loss"] for line in read_lines(tmp_path / n / "epochs.jsonl")] for n in ("plain", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
