"""A run that is killed and resumed ends with the same records and weights as an undisturbed one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from certipatch.records.manifest import read_manifest, read_manifest_file
from certipatch.records.read import read_lines
from certipatch.runtime.progress import Progress
from inputs import typed, write_manifest, write_photos

CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}  # the undisturbed run is one for both


# Forked off a process that has imported everything, which saves seconds for each.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["certipatch.certification.certify", "certipatch.training.train"])


def run(arguments: list[str], error: Path, ready: Callable[[], bool]) -> None:
    from certipatch.cli.app import main

    advance = Progress.advance
    woken, wake = socket.socketpair()
    woken.settimeout(10)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

    def and_wait(self: Progress, n: int, note: str) -> None:
        advance(self, n, note)
        if ready():
            woken.recv(1)  # a signal; on a busy machine it comes late
            woken.close()
            signal.set_wakeup_fd(-1)
            Progress.advance = advance

    Progress.advance = and_wait
    sys.argv, sys.stderr = ["certipatch", *arguments], error.open("w", buffering=1)
    main()


def start_and_stop(arguments: list[object], ready: Callable[[], bool], sig: int, error: Path) -> int:
    """The exit code of a command that gets the signal as soon as ``ready()``; it must still be at work
    then."""
    process = processes.Process(target=run, args=(list(map(str, arguments)), error, ready))
    process.start()
    deadline = time.monotonic() + 120
    while not ready():
        assert process.exitcode is None, error.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, sig)
    process.join(60)
    return process.exitcode


def has_lines(path: Path, n: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= n


def test_certify(cli, trained: Path, photos: Path, tmp_path: Path):
    data = write_photos(tmp_path / "many", each=34)  # 102 images: four blocks
    options = typed("certify", model=trained, data=data, patch=5, masks_per_axis=4, batch_size=64)
    whole = tmp_path / "whole"
    cli(*options, "--out", whole)

    for sig, code in CODES.items():
        broken = tmp_path / sig.name
        path, error = broken / "records.jsonl", tmp_path / f"{sig.name}.txt"

        assert (
            start_and_stop([*options, "--out", broken], partial(has_lines, path, 32), sig, error) == code
        ), error.read_text()
        assert "Traceback" not in error.read_text()
        assert 32 <= len(read_lines(path)) < 102
        assert read_manifest(broken).finished is None
        with path.open("ab") as file:
            file.write(b'{"index": 101, "na')  # what a kill in mid-line leaves

        assert cli(*options, "--out", broken, "--resume").code == 0
        assert path.read_bytes() == (whole / "records.jsonl").read_bytes()
        assert read_manifest(broken).finished["sha256"] == read_manifest(whole).finished["sha256"]


def test_train(cli, tmp_path: Path):
    """SIGKILL comes after some epoch; SIGINT also within one, where the step under way is saved."""
    options = typed("train", model="small-cnn", data="digits", strategy="random-both", limit=300, patch=5)
    options += typed(epochs=5, batch_size=16, seed=3)
    whole = tmp_path / "whole"
    cli(*options, "--out", whole)

    def without_time(folder: Path) -> list[dict[str, object]]:
        return [
            {key: value for key, value in line.items() if key != "seconds"}
            for line in read_lines(folder / "epochs.jsonl")
        ]

    for sig, code in CODES.items():
        broken = tmp_path / sig.name
        error = tmp_path / f"{sig.name}.txt"
        assert (
            start_and_stop([*options, "--out", broken], (broken / "checkpoint.pt").exists, sig, error) == code
        ), error.read_text()
        assert not (broken / "model.safetensors").exists()

        assert cli(*options, "--out", broken, "--resume").code == 0
        assert (
            read_manifest(broken).finished["weights_sha256"]
            == read_manifest(whole).finished["weights_sha256"]
        )
        assert without_time(broken) == without_time(whole)


@pytest.mark.parametrize("strategy", [("random-cutout",), ("greedy-coarse", "--search-every", 2)])
def test_resume_in_the_middle_of_an_epoch(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: tuple[object, ...]
):
    """Every step is a checkpoint. A run that dies in the middle of the second epoch loses nothing, the masks
    that it would use again neither."""
    options = typed("train", "--strategy", *strategy, model="small-cnn", data="digits", limit=96, patch=5)
    options += typed(epochs=3, batch_size=16)
    cli(*options, "--out", tmp_path / "whole")

    class PowerCut(BaseException):
        pass

    steps, cross_entropy = [], torch.nn.functional.cross_entropy

    def dies(*arguments: object, **of_search: object) -> object:
        steps.extend([] if of_search else [1])
        if len(steps) == 10:
            raise PowerCut
        return cross_entropy(*arguments, **of_search)

    monkeypatch.setattr("certipatch.training.checkpoint.CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr("torch.nn.functional.cross_entropy", dies)
    with pytest.raises(PowerCut):
        cli(*options, "--out", tmp_path / "broken")
    monkeypatch.setattr("torch.nn.functional.cross_entropy", cross_entropy)
    assert cli(*options, "--out", tmp_path / "broken", "--resume").code == 0
    whole, broken = (
        read_manifest(tmp_path / name).finished["weights_sha256"] for name in ("whole", "broken")
    )
    assert whole == broken
    costs = [
        [line["forward_equivalents"] for line in read_lines(tmp_path / name / "epochs.jsonl")]
        for name in ("whole", "broken")
    ]
    assert costs[0] == costs[1] == [96 * (20 if strategy[1:] and epoch != 1 else 3) for epoch in range(3)]


def test_a_block_that_was_written_in_part(cli, trained: Path, photos: Path, tmp_path: Path):
    """Its images that have no record get one, the others no second one."""
    options = typed("certify", model=trained, data=photos, patch=5, masks_per_axis=2, out=tmp_path)
    assert cli(*options).code == 0
    path = tmp_path / "records.jsonl"
    whole, manifest = path.read_bytes(), read_manifest_file(tmp_path / "manifest.json")
    for left in (5, 23):
        write_manifest(tmp_path / "manifest.json", manifest | {"finished": None})
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:left]))
        done = cli(*options, "--resume")
        assert done.code == 0, done.err
        assert path.read_bytes() == whole
