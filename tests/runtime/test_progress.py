"""What is seen of a run under way: rate, ETA and shares that are true, resumed or not.

Curves are those of the records.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from certipatch.certification.blocks import look
from certipatch.records.files import write_atomically
from certipatch.records.manifest import read_manifest
from certipatch.records.read import read_folder, read_lines
from certipatch.report.certification import summarize
from certipatch.runtime.console import say
from certipatch.runtime.progress import Progress, progress_bar, seen, sign_of_life
from certipatch.training.loop import vanilla_accuracy
from inputs import typed, write_photos

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("certipatch.runtime.progress.time", clock)
    return clock


def shown_on(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(
        "certipatch.runtime.progress.stderr",
        Console(file=out, force_terminal=terminal, width=80, highlight=False),
    )
    return out


def test_what_was_done_before_says_nothing_of_the_rate(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    out = shown_on(monkeypatch, terminal=False)
    with progress_bar(1000, "certify") as bar:
        clock.now += 50  # reading 500 records
        bar.resume(500)
        clock.now += 20
        bar.advance(100, "certified so far")
        clock.now += 380
        bar.advance(100, "certified so far")
    assert out.getvalue().splitlines() == [
        "certify 500/1000, done before",
        "certify 600/1000, 5.0 images/s, ETA 0:01:20, certified so far",
        "certify 700/1000, 2.0 s/image, ETA 0:10:00, certified so far",
    ]


def test_plain_lines_come_by_tenths_or_by_minutes(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    out = shown_on(monkeypatch, terminal=False)

    def lines(seconds: float) -> list[str]:
        before = len(out.getvalue())
        with progress_bar(1000, "train") as bar:
            bar.resume(0)
            for _ in range(1000):
                clock.now += seconds
                bar.advance(1, "")
        return [line.split("/")[0] for line in out.getvalue()[before:].splitlines()]

    assert lines(0.001) == [f"train {n}" for n in range(100, 1001, 100)]
    assert lines(3) == [f"train {n}" for n in [*range(20, 1000, 20), 1000]]


def test_bar_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    out = shown_on(monkeypatch, terminal=True)
    with progress_bar(1000, "certify") as bar:
        bar.resume(500)
        clock.now += 20
        bar.advance(100, "certified 50.0 % (300/600)")
    bar_line, note = [line for line in out.getvalue().splitlines() if "/" in line][-2:]
    assert "600/1000" in bar_line
    assert note == "5.0 images/s, ETA 0:01:20, certified 50.0 % (300/600)"


def test_views_between_two_images_are_shown(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    """Without a terminal after 4 seconds of silence, then each minute; records come in blocks."""
    monkeypatch.setattr("certipatch.runtime.progress.FIRST_SECONDS", 4)
    out = shown_on(monkeypatch, terminal=False)
    seen(views=9)  # of no run
    with progress_bar(100, "certify") as bar:
        for _ in range(3):
            clock.now += 1.5
            seen(views=100, decided=2)
        clock.now += 59
        seen(views=50)
        clock.now += 1
        seen(views=50)
        bar.advance(32, "certified so far")
        clock.now += 60
        seen(views=1800)
    assert out.getvalue().splitlines() == [
        "certify 0/100, 6 more decided, 300 views looked at for the next, 67 views/s",
        "certify 0/100, 6 more decided, 400 views looked at for the next, 6 views/s",
        "certify 32/100, 2.0 s/image, ETA 0:02:17, certified so far",
        "certify 32/100, 3.9 s/image, ETA 0:04:25, 1,800 views looked at for the next, 30 views/s",
    ]


def test_views_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    out = shown_on(monkeypatch, terminal=True)
    with progress_bar(100, "attack"):
        clock.now += 0.5
        seen(views=40)
        clock.now += 0.2
        seen(views=40)
    notes = {line.strip() for line in out.getvalue().splitlines() if "views" in line}
    assert notes == {"40 views looked at for the next, 80 views/s"}


@pytest.mark.parametrize("command", ["certify", "attack", "train"])
def test_each_command_shows_its_views(
    cli, trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
):
    """All of them, and how many images are decided, before the first line of a block."""
    found = {"views": 0, "decided": 0}
    look = Progress.look

    def counted(self: Progress, views: int, decided: int) -> str:
        found["views"], found["decided"] = found["views"] + views, found["decided"] + decided
        return look(self, views, decided)

    monkeypatch.setattr(Progress, "look", counted)
    given = typed(model=trained, data=photos)
    out = tmp_path / "certified"
    if command == "train":
        asked = typed(model="small-cnn", data=photos, val_data=photos, strategy="greedy-coarse", epochs=1)
        assert cli("train", *asked, patch=5, batch_size=8, out=tmp_path / "run").code == 0
        assert found == {"views": 24 * 17, "decided": 0}
        return
    assert cli("certify", *given, patch=5, masks_per_axis=2, out=out).code == 0
    passes = sum(record.passes for record in read_folder(out).records)
    assert found == {"views": passes, "decided": 24}
    if command == "attack":
        asked = typed(records=out, limit=4, steps=2, restarts=1, out=tmp_path / "attacked")
        assert cli("attack", *given, *asked).code == 0
        assert found["views"] > passes + 4 * 2
        assert found["decided"] >= 24 + 4


def test_a_silent_command_shows_that_it_lives(cli, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("certipatch.runtime.progress.FIRST_SECONDS", 0.05)
    monkeypatch.setattr("certipatch.cli.masks._facts", lambda *_: time.sleep(0.3) or {})
    assert cli("masks", image_size=32, patch=3, json=True).err == SIGN
    with sign_of_life("masks"):
        say("one word")
        time.sleep(0.3)
    with sign_of_life("masks"):
        pass
    time.sleep(0.1)
    assert capsys.readouterr().err == "one word\n"


SIGN = "masks: at work (reading images, loading the model)\n"


def test_certify_shows_the_share_of_all_that_are_done_and_what_to_open(
    cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data, out = write_photos(tmp_path / "data", each=16), tmp_path / "out"  # two blocks
    options = typed("certify", model=trained, data=data, patch=26, masks_per_axis=2, out=out)
    blocks = []

    def dies(*arguments: object) -> object:
        blocks.append(1)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return look(*arguments)

    monkeypatch.setattr("certipatch.certification.work.look", dies)
    assert cli(*options).code == 130
    monkeypatch.setattr("certipatch.certification.work.look", look)
    done = cli(*options, "--resume")
    folder = read_folder(out)
    share = summarize(folder).certified_robust_accuracy
    assert 0 < sum(record.certified for record in folder.records[:32]) <= share.count < share.images
    first, *_, last = [line for line in done.err.splitlines() if "at work" not in line]  # on a busy machine
    assert first == "certify 26x26-k2 32/48, done before"
    assert last.startswith("certify 26x26-k2 48/48, ")
    assert last.endswith(f", ETA 0:00:00, certified {100 * share.count / 48:.1f} % ({share.count}/48)")
    assert done.out.splitlines()[-1] == f"next: certipatch report {out} --html {out}.html"


TRAIN = typed(
    "train",
    model="small-cnn",
    data="digits",
    strategy="random-cutout",
    limit=96,
    patch=5,
    epochs=3,
    batch_size=16,
)


def read_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }


def without_time(run: Path) -> list[dict[str, object]]:
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_lines(run / "epochs.jsonl")
    ]


def test_curves_are_those_of_the_records_and_change_nothing(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run dies in its second epoch, after a checkpoint and one more step, and is resumed: no step is
    missing, none is there twice."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    plain, drawn = tmp_path / "plain", tmp_path / "drawn"
    assert cli(*TRAIN, "--out", plain).code == 0
    assert not (plain / "tensorboard").exists()

    class PowerCut(BaseException):
        pass

    checkpoints = []

    def dies(path: Path, *parts: bytes, alone: bool) -> None:
        checkpoints.append(path)
        if len(checkpoints) == 10:
            raise PowerCut
        write_atomically(path, *parts, alone=alone)

    monkeypatch.setattr("certipatch.training.checkpoint.CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr("certipatch.training.checkpoint.write_atomically", dies)
    with pytest.raises(PowerCut):
        cli(*TRAIN, "--tensorboard", "--out", drawn)
    before = read_curves(drawn)
    monkeypatch.setattr("certipatch.training.checkpoint.write_atomically", write_atomically)
    done = cli(*TRAIN, "--tensorboard", "--out", drawn, "--resume")
    assert done.code == 0, done.err
    assert f"curves: tensorboard --logdir {drawn}/tensorboard" in done.out
    last = read_lines(drawn / "epochs.jsonl")[-1]["validation_vanilla"]
    assert f"validation vanilla accuracy {100 * last['correct'] / last['images']:.1f} % " in done.out

    assert read_manifest(drawn).finished["weights_sha256"] == read_manifest(plain).finished["weights_sha256"]
    assert without_time(drawn) == without_time(plain)
    assert read_manifest(drawn).stated == read_manifest(plain).stated

    curves, epochs = read_curves(drawn), read_lines(drawn / "epochs.jsonl")
    assert set(curves) == {f"step/{name}" for name in ("loss", "lr", "images_per_second")} | {
        f"epoch/{name}"
        for name in (
            "loss",
            "lr",
            "right_under_the_masks",
            "validation_vanilla_accuracy",
            "images_per_second",
        )
    }
    assert [step for step, _ in before["step/loss"]] == list(range(1, 10)), (
        "the step after the last checkpoint was drawn too"
    )
    for tag, points in curves.items():
        assert [step for step, _ in points] == (
            list(range(1, 19)) if tag.startswith("step/") else [6, 12, 18]
        ), tag
        assert all(value > 0 for _, value in points), tag
    for i, line in enumerate(epochs):
        found = {
            tag.removeprefix("epoch/"): points[i][1]
            for tag, points in curves.items()
            if tag.startswith("epoch/")
        }
        right = line["validation_vanilla"]
        assert found == pytest.approx(
            {
                "loss": line["loss"],
                "lr": line["lr"],
                "right_under_the_masks": line["masked_correct"] / line["masked_views"],
                "validation_vanilla_accuracy": right["correct"] / right["images"],
                "images_per_second": line["images"] / line["seconds"],
            },
            rel=1e-5,
        )
        steps = [value for _, value in curves["step/loss"][6 * i : 6 * i + 6]]
        assert sum(steps) / 6 == pytest.approx(line["loss"], rel=1e-5)
        assert [value for _, value in curves["step/lr"][6 * i : 6 * i + 6]] == pytest.approx([line["lr"]] * 6)


def test_resumed_training_counts_the_epochs_before(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):

    seen = []

    def dies(*_: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return validate(*_)

    validate = vanilla_accuracy
    monkeypatch.setattr("certipatch.training.loop.vanilla_accuracy", dies)
    assert cli(*TRAIN, "--out", tmp_path / "run").code == 130
    monkeypatch.setattr("certipatch.training.loop.vanilla_accuracy", validate)
    first, *_, last = cli(*TRAIN, "--out", tmp_path / "run", "--resume").err.splitlines()
    assert first == "train 192/288, done before"
    assert last.startswith("train 288/288, ")
    assert "epoch 3/3, loss " in last
    line = read_lines(tmp_path / "run" / "epochs.jsonl")[-1]
    assert (
        f"right under the masks {100 * line['masked_correct'] / 96:.1f} % ({line['masked_correct']}/96)"
        in last
    )


def test_tensorboard_without_its_package(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for package in ("TENSORBOARD", "TENSORBOARDX"):
        monkeypatch.setattr(f"lightning_fabric.loggers.tensorboard._{package}_AVAILABLE", False)
    done = cli(*TRAIN, "--tensorboard", "--out", tmp_path / "run")
    assert (done.code, done.err) == (
        3,
        "certipatch: log tensorboard: expected its package, found none; "
        "pip install 'certipatch[tensorboard]'\n",
    )
    assert not (tmp_path / "run").exists()
