"""A model is built, read and hashed once a command, however many certifications it is for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from certipatch.models import build, weights
from inputs import typed

COUNTED: list[tuple[Any, str]] = [
    (safetensors.torch, "load_file"),
    (weights, "read_weights"),
    (weights, "weights_sha256"),
    (build, "build"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of ``COUNTED`` is called, under whatever name a module has imported it."""
    found: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found[name] += 1
            return function(*arguments, **options)

        return call

    for home, name in COUNTED:
        function = getattr(home, name)
        instead = counted(name, function)
        users = [module for module in sys.modules.values() if vars(module).get(name) is function]
        assert home in users
        for module in users:
            monkeypatch.setattr(module, name, instead)
    return found


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("certify", {"masks_per_axis": "2,3"}),
        ("certify", {"masks_per_axis": 2, "device": "cpu", "inference": "challenger"}),
        ("detect", {"masks_per_axis": "2,3"}),
    ],
)
def test_weights_of_a_run_are_read_and_hashed_once(
    cli, trained: Path, photos: Path, tmp_path: Path, calls: Counter[str], command: str, more: dict[str, Any]
):
    done = cli(command, model=trained, data=photos, patch=8, limit=3, out=tmp_path / "out", **more)
    assert done.code == 0, done.err
    assert calls == {name: 1 for _, name in COUNTED}


def test_weights_of_a_file_are_read_and_hashed_once(
    cli, trained: Path, photos: Path, tmp_path: Path, calls: Counter[str]
):
    given = typed("certify", model="small-cnn", weights=trained / "model.safetensors", data=photos)
    done = cli(*given, patch=8, masks_per_axis="2,3", limit=3, out=tmp_path / "out")
    assert done.code == 0, done.err
    assert calls == {name: 1 for _, name in COUNTED}


def test_attack_predict_and_verify_load_once_too(
    cli, trained: Path, photos: Path, tmp_path: Path, calls: Counter[str]
):
    given, out = typed(model=trained, data=photos), tmp_path / "certified"
    assert cli("certify", *given, patch=8, masks_per_axis=2, limit=3, out=out).code == 0
    for line in (
        typed("attack", *given, records=out, steps=1, restarts=1, out=tmp_path / "attacked"),
        typed("predict", photos / "red" / "0.png", model=trained, certified=out),
        typed("verify", out, *given),
    ):
        calls.clear()
        done = cli(*line)
        assert done.code == 0, done.err
        assert calls == {name: 1 for _, name in COUNTED}, line[0]
