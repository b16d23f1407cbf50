"""``make gpu``: what is measured in the minutes that a GPU is at hand, here on a CPU with a tiny limit."""

from __future__ import annotations

import importlib.util
import json
import time
from contextlib import suppress
from pathlib import Path

import pytest

from certipatch.models.small import SMALL_CNN

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PACED", 0.01)
    return module


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def test_it_stops_in_time_and_goes_on(gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A part that takes too long is stopped, whatever it catches; what is done is not done again."""
    calls = []

    def quick(_bench: object) -> dict[str, int]:
        calls.append("quick")
        return {"answer": 42}

    def fails(_bench: object) -> dict[str, int]:
        calls.append("fails")
        raise RuntimeError("no such kernel")

    def slow(_bench: object) -> dict[str, int]:
        calls.append("slow")
        for _ in range(600):
            with suppress(Exception):
                time.sleep(0.1)
        return {}

    some = [
        ("quick", quick, 9),
        ("fails", fails, 9),
        ("slow", slow, 0.3),
        ("slower", slow, 99),
        ("last", quick, 9),
    ]
    monkeypatch.setattr(gpu, "parts", lambda _: some)
    began = time.monotonic()
    words = ["--out", str(tmp_path / "out"), "--device", "cpu", "--models", SMALL_CNN]
    assert gpu.main([*words, "--seconds", "2"]) == 0
    assert time.monotonic() - began < 4
    assert calls == ["quick", "fails", "slow", "slow"]
    found = lines(tmp_path / "out")
    assert [line["part"] for line in found] == ["quick", "fails", "slow", "slower"]
    assert found[0]["found"] == {"answer": 42}
    assert found[0]["instructions"], "and on what"
    assert "no such kernel" in found[1]["failed"]
    assert [line["stopped"] for line in found[2:]] == ["its time was over", "no time was left"]

    calls.clear()
    gpu.main([*words, "--seconds", "2"])
    assert calls == ["fails", "slow", "slow"], "what was done is not done again"


@pytest.mark.parametrize("part", ["card", "forward", "step", "search", "certify", "answers", "recipe"])
def test_the_parts_measure(gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str):
    monkeypatch.setattr(gpu, "fastest_batch_size", lambda *_: 32)
    bench = gpu.Bench(tmp_path, "cpu", 32, 4, "32-true", None)
    measure = {name.split()[0]: each for name, each, _ in reversed(list(gpu.parts([SMALL_CNN])))}[part]
    found = measure(bench)
    if part in ("forward", "search", "certify"):
        assert found["views_a_second"] > 0
    elif part == "step":
        assert set(found["images_a_second"]) == {"ours", "plain", "search"}
        assert all(value > 0 for value in found["images_a_second"].values())
    elif part == "answers":
        assert found == {"images": 4, "same": 4}
    else:
        assert found.keys() & {"tflops", "runs"}


def test_the_order_is_that_of_the_worth(gpu):
    names = [name for name, _, _ in gpu.parts(["a", "b"])]
    assert names == [
        *("card", "forward a", "step a", "search a", "certify a", "forward b", "step b", "search b"),
        *(
            "certify b",
            "answers a",
            "published a",
            "certify compiled a",
            "certify compiled b",
            "recipe lite0",
        ),
    ]
