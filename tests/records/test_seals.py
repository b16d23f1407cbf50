"""What is changed on a disk after it was written is refused by whoever reads it.

This holds in a finished folder and in one under way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from certipatch.errors import RecordsError
from certipatch.records.manifest import begin_manifest, read_manifest
from certipatch.records.read import read_written
from certipatch.records.store import Store
from certipatch.report.certification import training_cost
from inputs import typed

LINES = [{"line": i, "text": "é\u2028"} for i in range(5)]


def store(folder: Path, *, resume: bool = False) -> Store:
    about = begin_manifest("test", {"a": 1, "float": 0.1, "text": "é"})
    return Store(folder, about, "lines.jsonl", resume=resume)


@pytest.fixture
def under_way(tmp_path: Path) -> Path:
    with store(tmp_path / "out") as file:
        file.append(LINES[:2])
        file.append(LINES[2:])
    return tmp_path / "out"


@pytest.fixture
def finished(under_way: Path) -> Path:
    with store(under_way, resume=True) as file:
        file.finish(note="all there")
    return under_way


@pytest.mark.parametrize("state", ["under_way", "finished"])
def test_every_bit_of_a_manifest(state: str, request: pytest.FixtureRequest):
    """A flipped bit is refused, or changes nothing but how the same entries are written."""
    folder: Path = request.getfixturevalue(state)
    path, kept = folder / "manifest.json", read_manifest(folder).written
    data, same = path.read_bytes(), []
    for bit in range(8 * len(data)):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        try:
            found = read_manifest(folder).written
        except RecordsError:
            continue
        same.append(bit)
        found.pop(next((key for key in found if key not in kept), ""), None)  # the hash as "rha256"
        assert found == kept
    assert len(same) < 80


def test_order_and_layout_of_a_manifest_do_not_matter(finished: Path):
    path, kept = finished / "manifest.json", read_manifest(finished)
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert read_manifest(finished) == kept
    path.write_text(json.dumps(kept.written))  # as before there were hashes
    assert read_manifest(finished) == kept


@pytest.mark.parametrize("state", ["under_way", "finished"])
def test_every_bit_of_the_lines(state: str, request: pytest.FixtureRequest):
    folder: Path = request.getfixturevalue(state)
    path, data = folder / "lines.jsonl", (folder / "lines.jsonl").read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        if state == "under_way" and bit // 8 == len(data) - 1:
            # Without its end the last line is one that a kill has torn.
            assert read_written(folder, "lines.jsonl") == LINES[:4]
            continue
        with pytest.raises(RecordsError, match=r"lines\.jsonl"):
            read_written(folder, "lines.jsonl")
        if bit % 150 == 0:
            with pytest.raises(RecordsError, match=r"lines\.jsonl"), store(folder, resume=True):
                pass


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "exchanged": lambda lines: [lines[1], lines[0], *lines[2:]],
    "doubled": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "dropped": lambda lines: [lines[0], *lines[2:]],
    "added": lambda lines: [*lines, lines[0]],
    "empty": lambda lines: [*lines, b"{}\n"],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_lines_of_a_run_under_way(under_way: Path, change: Callable[[list[bytes]], list[bytes]]):
    path = under_way / "lines.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with (
        pytest.raises(
            RecordsError, match=r"lines\.jsonl, line \d: is not what was written \(by lines.sha256\); restore"
        ),
        store(under_way, resume=True),
    ):
        pass


def test_what_a_kill_leaves_is_no_damage(under_way: Path):
    """A torn line, a torn hash, and hashes of lines that were not written are cut and written again.

    Here they are written with other content, so that one sees it.
    """
    path, hashes = under_way / "lines.jsonl", under_way / "lines.sha256"
    lines = path.read_bytes().splitlines(keepends=True)
    for left, torn, hash_end in [
        (5, b'{"line": 7, "te', 0),
        (3, b"", 0),
        (3, lines[3][:5], 20),
        (0, b"", 40),
        (2, b"", 3 * 65),
    ]:
        path.write_bytes(b"".join(lines[:left]) + torn)
        hashes.write_bytes(hashes.read_bytes()[: len(hashes.read_bytes()) - hash_end])
        with store(under_way, resume=True) as file:
            assert file.lines == LINES[:left]
            file.append([{"again": i} for i in range(5 - left)])
        assert read_written(under_way, "lines.jsonl") == LINES[:left] + [
            {"again": i} for i in range(5 - left)
        ]
        path.unlink()
        with store(under_way, resume=True) as file:
            file.append(LINES)
    hashes.unlink()
    with pytest.raises(RecordsError, match=r"lines\.jsonl: expected lines\.sha256 .* beside it, found none"):
        read_written(under_way, "lines.jsonl")


def test_lines_that_change_under_way_are_not_sealed(under_way: Path):
    path = under_way / "lines.jsonl"
    with store(under_way, resume=True) as file:
        path.write_bytes(path.read_bytes().replace(b'"line": 3', b'"line": 4'))
        with pytest.raises(RecordsError, match="line 4: is not what was written"):
            file.finish()
    assert read_manifest(under_way).finished is None


class TestTraining:
    @pytest.fixture
    def train(self, cli, photos: Path) -> Callable[..., object]:
        options = typed(
            "train", model="small-cnn", data=photos, val_data=photos, strategy="vanilla", patch=5, epochs=2
        )
        return lambda out, *more: cli(*options, *more, batch_size=8, out=out)

    @pytest.fixture
    def stopped(self, train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A run that died at its end, when its last checkpoint was written."""
        with monkeypatch.context() as patch:
            patch.setattr("safetensors.torch.save", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(tmp_path / "run")
        return tmp_path / "run"

    def test_checkpoint(self, train, stopped: Path):
        path = stopped / "checkpoint.pt"
        data = path.read_bytes()
        for place in (0, 63, 64, len(data) // 3, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            outcome = train(stopped, "--resume")
            assert outcome.code == 2, outcome
            assert "checkpoint.pt: damaged" in outcome.err
            assert "delete it" in outcome.err
        for end in (0, 64, len(data) - 1):
            path.write_bytes(data[:end])
            assert "checkpoint.pt: damaged" in train(stopped, "--resume").err
        path.unlink()
        assert train(stopped, "--resume").code == 0  # from the start

    def test_fewer_epochs_than_the_checkpoint_follows(self, train, stopped: Path):
        lines = (stopped / "epochs.jsonl").read_bytes().splitlines(keepends=True)
        assert len(lines) == 2
        (stopped / "epochs.jsonl").write_bytes(lines[0])
        outcome = train(stopped, "--resume")
        assert outcome.code == 2, outcome
        assert "epochs.jsonl: expected the lines of 2 epochs" in outcome.err
        (stopped / "checkpoint.pt").unlink()
        assert train(stopped, "--resume").code == 0
        assert len((stopped / "epochs.jsonl").read_bytes().splitlines()) == 2

    def test_the_cost_of_a_finished_run(self, train, tmp_path: Path):
        assert train(tmp_path / "run").code == 0
        assert training_cost(tmp_path / "run") == 6
        path = tmp_path / "run" / "epochs.jsonl"
        path.write_bytes(
            path.read_bytes().replace(b'"forward_equivalents": 72', b'"forward_equivalents": 73')
        )
        with pytest.raises(RecordsError, match="is not what was written"):
            training_cost(tmp_path / "run")
