"""What a command depends on, and what not: names, locale, home folder, and which images a limit leaves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from certipatch.cli.open import open_both
from certipatch.config import DataAsked, ModelAsked
from certipatch.data import load_source
from certipatch.models import describe
from certipatch.models.build import build
from certipatch.records.manifest import read_manifest
from inputs import typed, write_photos


def run(*words: object, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with these environment variables; None takes one away."""
    kept = {name: value for name, value in os.environ.items() if environment.get(name, "") is not None}
    return subprocess.run(
        [sys.executable, "-m", "certipatch", *map(str, words)],
        env={**kept, **{name: value for name, value in environment.items() if value is not None}},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


class TestLimit:
    """What is certified depends on the whole data set, never on which images a limit leaves."""

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        """Images larger than the model's input, but for the first of each class, which a limit leaves."""
        data = write_photos(tmp_path / "data", each=8, size=200)
        for image in data.glob("*/0.png"):
            Image.open(image).resize((32, 32)).save(image)
        return data

    def test_of_weights_of_ones_own(self, data: Path, tmp_path: Path):
        spec = describe("test_efficientnet", classes=("blue", "green", "red"), num_classes=3)
        torch.save(build(spec)[1].state_dict(), tmp_path / "weights.pth")
        model = ModelAsked("test_efficientnet", weights=str(tmp_path / "weights.pth"))
        for limit in (1, 2, 3, 5, None):
            source, opened = open_both(model, DataAsked(str(data)), limit=limit)
            assert len(source) == (limit or 24)
            assert opened.spec == spec

    def test_of_training(self, cli, data: Path, tmp_path: Path):
        given = typed(
            "train", model="test_efficientnet", data=data, val_data=data, strategy="vanilla", patch=9
        )
        done = cli(*given, epochs=1, batch_size=3, limit=3, out=tmp_path / "run")
        assert done.code == 0, done.err
        spec = describe("test_efficientnet", classes=("blue", "green", "red"), num_classes=3)
        assert read_manifest(tmp_path / "run").stated["model"] == spec.model_dump(mode="json")

    def test_a_class_that_it_leaves_out_is_no_missing_class(
        self, cli, trained: Path, photos: Path, tmp_path: Path
    ):
        done = cli(
            "certify", model=trained, data=photos, patch=5, masks_per_axis=2, limit=1, out=tmp_path / "c"
        )
        assert done.code == 0, done.err


class TestNames:
    def test_of_a_class_are_refused_before_training(self, photos: Path, tmp_path: Path, cli):
        data = tmp_path / "data"
        shutil.copytree(photos, data)
        os.rename(data / "red", data / os.fsdecode(b"caf\xe9"))
        given = typed("train", model="small-cnn", data=data, val_data=photos, strategy="vanilla")
        done = cli(*given, patch=5, out=tmp_path / "run")
        assert (done.code, len(done.err.splitlines())) == (2, 1)
        assert "expected names in UTF-8" in done.err
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("option", ["data", "out"])
    def test_on_the_command_line(self, trained: Path, photos: Path, tmp_path: Path, option: str):
        """They would stand in a manifest."""
        odd = tmp_path / os.fsdecode(b"caf\xe9")
        shutil.copytree(photos, odd)
        given = {"model": trained, "data": photos, "patch": 5, "out": tmp_path / "c", option: odd}
        words = [w for name, value in given.items() for w in (f"--{name}", value)]
        done = run("certify", *words)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert "expected names in UTF-8" in done.stderr
        assert not (tmp_path / "c").exists()


def test_no_locale(cli, tmp_path: Path):
    """Names of classes and images are the same under any locale, and what cannot be shown is escaped."""
    data = write_photos(tmp_path / "data", classes=("café", "猫"), each=2)
    none = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    given = typed("train", model="small-cnn", data=data, val_data=data, strategy="vanilla", patch=5, epochs=1)
    done = run(*given, "--out", tmp_path / "run", **none)
    assert done.returncode == 0, done.stderr
    stated = read_manifest(tmp_path / "run").stated
    assert stated["model"]["classes"] == ["café", "猫"]
    assert stated["data"] == load_source(str(data)).describe()
    given = typed("certify", model=tmp_path / "run", data=data, patch=5, masks_per_axis=2, out=tmp_path / "c")
    done = run(*given, **none)
    assert done.returncode == 0, done.stderr
    done = run("report", tmp_path / "c", "--html", tmp_path / "none.html", **none)
    assert done.returncode == 0, done.stderr
    assert cli("report", tmp_path / "c", html=tmp_path / "utf-8.html").code == 0
    written = [(tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in ("none", "utf-8")]
    pages = [re.sub(r"T\d\d:\d\d:\d\d", "", page) for page in written]
    assert pages[0] == pages[1]


def test_no_home_folder(trained: Path, photos: Path, tmp_path: Path):
    """A container whose user is in no list of users; only a download needs a place to go."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef missing(*_): raise KeyError('no such user')\npwd.getpwuid = pwd.getpwnam = missing\n"
    )
    none = {"HOME": None, "USER": None, "LOGNAME": None, "CERTIPATCH_DATA": None, "LNAME": None}
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    given = typed(model=trained, data=photos, patch=5, masks_per_axis=2, out=tmp_path / "c", limit=3)
    done = run("certify", *given, PYTHONPATH=path, **none)
    assert done.returncode == 0, done.stderr
    given = typed(model=trained, data="torch/cifar10", patch=5, out=tmp_path / "d")
    done = run("certify", *given, PYTHONPATH=path, **none)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done.stderr
    assert "set CERTIPATCH_DATA" in done.stderr
