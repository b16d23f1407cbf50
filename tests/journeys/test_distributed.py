"""Several processes do what one would: the same weights, each image once, and an end together when one of
them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm

from certipatch.data.load import load_source
from certipatch.errors import ConfigError
from certipatch.geometry.masks import MaskSet
from certipatch.models.build import build
from certipatch.models.runs import load_run
from certipatch.records.manifest import read_manifest
from certipatch.records.read import read_lines
from certipatch.runtime.devices import derived_seed
from certipatch.runtime.processes import GONE, PARENT, _Family
from certipatch.training.batches import check_batch, epoch_batches, part_of
from certipatch.training.hiding import BatchPart
from certipatch.training.masking import _leave_clean
from certipatch.training.strategies import STRATEGIES
from certipatch.views.masked import visible
from inputs import typed, write_photos
from processes import ENVIRONMENT, kill_process_1

pytestmark = pytest.mark.usefixtures("one_thread")


def ours(error: str) -> list[str]:
    """Everything on stderr but the progress."""
    return [line for line in error.splitlines() if not line.startswith(("train ", "train: at work"))]


def pair(folder: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What process 0 and process 1 of ``pair.py`` made of each job."""
    folder.mkdir()
    given = json.dumps([{**job, "arguments": list(map(str, job["arguments"]))} for job in jobs.values()])
    command = [sys.executable, str(Path(__file__).with_name("pair.py")), given, str(folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True)
    try:
        assert process.wait(90) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return dict(zip(jobs, zip(*results, strict=True), strict=True))


def without_time(folder: Path) -> list[dict[str, object]]:
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_lines(folder / "epochs.jsonl")
    ]


def test_two_processes_train_as_one_with_the_doubled_batch(cli, runs: SimpleNamespace, tmp_path: Path):
    """Random masks, clean images and a remainder (22 images, batches of 8), on a network without
    BatchNorm."""
    one, two = tmp_path / "one", runs.two
    assert cli(*runs.for_one, "--batch-size", 8, "--out", one).code == 0
    done, _ = runs.jobs["as one"]
    assert (done["code"], ours(done["err"])) == (0, [])
    assert json.loads(done["out"])["images"] == 16, "one process prints, and only the result"

    assert read_manifest(two).stated["processes"] == 2
    expected, found = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    before = build(load_run(two)[0])[1].state_dict()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=0, atol=1e-6)
    assert max((weights - before[name]).abs().max() for name, weights in expected.items()) > 0.01, (
        "they were trained"
    )
    for a, b in zip(without_time(one), without_time(two), strict=True):
        assert {**a, "loss": 0} == {**b, "loss": 0}
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.fixture(scope="module")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One run that loses process 1, and then, in one pair of processes, what becomes of it and of others.

    With BatchNorm and a search in every second epoch, which depends on the running statistics.
    """
    folder = tmp_path_factory.mktemp("distributed")
    base = ["train", "--model", "small-cnn", "--patch", 5, "--lr", 0.05, "--device", "cpu", "--devices", 2]
    data = ["--data", photos, "--val-data", photos]
    search = ["--strategy", "greedy-coarse", "--search-every", 2]
    options = [*base, *data, *search, "--epochs", 12, "--batch-size", 3]
    whole, broken = folder / "whole", folder / "broken"
    killed = kill_process_1([*options, "--out", broken], broken / "checkpoint.pt")
    kept = without_time(broken)

    # The first batch of process 1, and the validation images of process 1.
    train, validation, fine = (
        write_photos(folder / name, each=each)
        for name, each in [("train", 8), ("validation", 3), ("fine", 3)]
    )
    unreadable = part_of(epoch_batches(24, 8, derived_seed(0, 0))[0], 1, 2)[0], 3
    names = [
        load_source(str(source)).names[image]
        for source, image in zip((train, validation), unreadable, strict=True)
    ]
    for source, name in zip((train, validation), names, strict=True):
        (source / name).write_bytes(b"no image")
    vanilla = [*base, "--strategy", "vanilla", "--epochs", 1, "--batch-size", 4]

    again = [*options, "--out", broken, "--resume"]
    network = ["--model", "test_vit", "--image-size", 32]
    masked = ["--strategy", "random-both", "--clean-fraction", 0.3, "--patch", 5]
    rest = ["--limit", 22, "--epochs", 3, "--lr", 0.05, "--device", "cpu"]
    for_one = ["train", *network, *data, *masked, *rest]
    two = folder / "two"
    jobs = {
        "as one": {"arguments": [*for_one, "--batch-size", 4, "--devices", 2, "--json", "--out", two]},
        "stopped": {"arguments": again, "sigterm": 3},  # of four steps in an epoch
        "resumed": {"arguments": again},
        "undisturbed": {"arguments": [*options, "--out", whole]},
        "holds this experiment already": {"arguments": [*options, "--out", whole]},
        "expected finite": {"arguments": [*options, "--lr", "1e30", "--out", folder / "diverged"]},
        f"image {names[0]} cannot be read": {
            "arguments": [*vanilla, "--data", train, "--val-data", fine, "--out", folder / "a"]
        },
        f"image {names[1]} cannot be read": {
            "arguments": [*vanilla, "--data", fine, "--val-data", validation, "--out", folder / "b"]
        },
    }
    done = pair(folder / "pair", jobs)
    return SimpleNamespace(
        whole=whole, broken=broken, killed=killed, kept=kept, two=two, for_one=for_one, jobs=done
    )


def test_a_killed_process_ends_the_run_with_one_line(runs: SimpleNamespace):
    assert (runs.killed.code, runs.killed.out) == (3, "")
    (line,) = ours(runs.killed.err)
    assert line.startswith("certipatch: a process of this run has ended")
    assert 1 <= len(runs.kept) < 12


def test_a_killed_run_that_is_resumed_ends_as_an_undisturbed_one(runs: SimpleNamespace):
    """On the way it is stopped once more, by SIGTERM to process 1 within an epoch: both stop in that step."""
    stopped = runs.jobs["stopped"]
    assert [(process["code"], process["batches"]) for process in stopped] == [(130, 3), (130, 3)]
    assert ours(stopped[0]["err"]) == [
        f"interrupted; what is done is kept in {runs.broken}: run the same command with --resume"
    ]
    assert [process["code"] for name in ("resumed", "undisturbed") for process in runs.jobs[name]] == [0] * 4
    found = without_time(runs.broken)
    assert found == without_time(runs.whole)
    assert found[: len(runs.kept)] == runs.kept
    assert [line["forward_equivalents"] for line in found] == 6 * [24 * 20, 24 * 3], (
        "each uses what the other had found"
    )
    whole = read_manifest(runs.whole).finished["weights_sha256"]
    assert read_manifest(runs.broken).finished["weights_sha256"] == whole
    assert [process["weights"] for process in runs.jobs["undisturbed"]] == [[whole], [whole]], (
        "BatchNorm's statistics too"
    )


def test_what_fails_on_one_process_ends_both_with_one_line(runs: SimpleNamespace):
    """Process 0 cannot write; the loss of either; an image that only process 1 reads, in training and in
    validation."""
    failures = list(runs.jobs.items())[4:]
    assert len(failures) == 4
    for words, both in failures:
        assert [process["code"] for process in both] == [2, 2]
        (line,) = ours(both[0]["err"])
        assert line.startswith("certipatch: ")
        assert words in line


def test_process_1_says_nothing(runs: SimpleNamespace):
    assert {process["out"] + process["err"] for _, process in runs.jobs.values()} == {""}


@pytest.mark.parametrize("gone", ["child", "parent"])
def test_a_process_that_waits_for_ever_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str):
    """NCCL waits for a process that is gone; here a process sleeps whose child has failed, or whose parent
    has ended."""
    monkeypatch.setattr("certipatch.runtime.processes.GRACE", 0.1)
    error = tmp_path / "error"
    pid = os.fork()
    if not pid:
        children = []
        if gone == "child":
            children = [subprocess.Popen(["false"])]
        else:
            os.environ[PARENT] = str(os.getpid())
            if os.fork():
                os._exit(2)
        sys.stderr = error.open("w")
        launcher = SimpleNamespace(procs=children)
        _Family(
            SimpleNamespace(local_rank=int(gone == "parent"), strategy=SimpleNamespace(launcher=launcher))
        )  # type: ignore[arg-type]
        time.sleep(20)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    deadline = time.monotonic() + 10
    while not error.exists() or not error.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert error.read_text() == f"certipatch: {GONE}\n"


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("images", "batch_size"), [(24, 4), (25, 3), (7, 4), (3, 1)])
def test_every_image_goes_to_one_process_at_most(images: int, batch_size: int, processes: int):
    batches = epoch_batches(images, batch_size * processes, seed=5)
    parts = [[part_of(batch, rank, processes) for batch in batches] for rank in range(processes)]
    seen = [image for part in parts for batch in part for image in batch]
    assert len(seen) == len(set(seen)) > images - batch_size * processes
    for batch, *shares in zip(batches, *parts, strict=True):
        assert len({len(share) for share in shares}) == 1
        assert [image for share in shares for image in share] == batch[: sum(map(len, shares))], "in order"


@pytest.mark.parametrize(
    "name", ["random-cutout", "random-coarse", "random-fine", "random-both", "random-band"]
)
def test_parts_of_a_batch_draw_what_the_whole_does(name: str):
    masks = MaskSet.covering(image_size=(18, 18), patch_size=(3, 3), masks_per_axis=6)

    def masked(n: int, part: BatchPart | None) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        copies = STRATEGIES[name](
            None, torch.zeros(n, 3, 18, 18), None, masks, fill=0.0, generator=generator, part=part
        )
        return [_leave_clean(visible(windows, (18, 18)), 0.7, part or BatchPart(0, n)) for windows in copies]

    for copy, *parts in zip(
        masked(6, None), *(masked(2, BatchPart(start, 6)) for start in (0, 2, 4)), strict=True
    ):
        assert torch.equal(copy, torch.cat(parts))
        assert [bool(keep.all()) for keep in copy] == [True] * 4 + [False] * 2


def test_synchronised_batchnorm_is_the_same_network():
    """What a CUDA run of several processes trains has the names and, in evaluation, the function of what was
    given."""
    network = timm.create_model("test_efficientnet").eval()
    names, images = list(network.state_dict()), torch.rand(2, 3, 32, 32)
    expected = network(images)
    network = convert_sync_batchnorm(network)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in network.modules())
    assert list(network.state_dict()) == names
    assert torch.equal(network(images), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-size", 1], "BatchNorm expects at least 2"),
        (["--devices", "some"], "devices 'some': expected a number of 1 or more, or auto"),
        (["--devices", 0], "devices '0'"),
    ],
)
def test_refusals(cli, photos: Path, tmp_path: Path, options: list[object], words: str):
    base = typed(
        "train", model="small-cnn", data=photos, val_data=photos, strategy="vanilla", patch=5, device="cpu"
    )
    done = cli(*base, *options, "--out", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_fewer_images_than_processes():
    fabric, network = SimpleNamespace(world_size=4, device=torch.device("cpu")), torch.nn.Linear(1, 1)
    check_batch(network, 4, 64, fabric)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="3 images for 4 processes"):
        check_batch(network, 3, 64, fabric)  # type: ignore[arg-type]
