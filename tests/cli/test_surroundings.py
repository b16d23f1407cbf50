"""What a command depends on, and what not: names, locale, home folder, and which images a limit leaves."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from certipatch.cli.open import open_both
from certipatch.config import DataAsked, ModelAsked
from certipatch.data import load_source
from certipatch.data.source import Images
from certipatch.models import describe
from certipatch.models.build import build
from certipatch.records.manifest import read_manifest
from inputs import typed, write_photos

BARE = """
import multiprocessing, pwd
def missing(*_): raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = missing
multiprocessing.set_start_method({start!r})
"""
NO_HOME = {"HOME": None, "USER": None, "LOGNAME": None, "CERTIPATCH_DATA": None, "LNAME": None}
NO_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(*words: object, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with these environment variables; None takes one away.

    Its stderr is without the sign of life that a busy machine brings.
    """
    kept = {name: value for name, value in os.environ.items() if environment.get(name, "") is not None}
    done = subprocess.run(
        [sys.executable, "-m", "certipatch", *map(str, words)],
        env={**kept, **{name: value for name, value in environment.items() if value is not None}},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    done.stderr = "".join(line for line in done.stderr.splitlines(keepends=True) if ": at work (" not in line)
    return done


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
    given = typed("train", model="small-cnn", data=data, val_data=data, strategy="vanilla", patch=5, epochs=1)
    done = run(*given, "--out", tmp_path / "run", **NO_LOCALE)
    assert done.returncode == 0, done.stderr
    stated = read_manifest(tmp_path / "run").stated
    assert stated["model"]["classes"] == ["café", "猫"]
    assert stated["data"] == load_source(str(data)).describe()
    given = typed("certify", model=tmp_path / "run", data=data, patch=5, masks_per_axis=2, out=tmp_path / "c")
    done = run(*given, **NO_LOCALE)
    assert done.returncode == 0, done.stderr
    done = run("report", tmp_path / "c", "--html", tmp_path / "none.html", **NO_LOCALE)
    assert done.returncode == 0, done.stderr
    assert cli("report", tmp_path / "c", html=tmp_path / "utf-8.html").code == 0
    written = [(tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in ("none", "utf-8")]
    pages = [re.sub(r"T\d\d:\d\d:\d\d", "", page) for page in written]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("start", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_bare_machine(cli, photos: Path, tmp_path: Path, start: str):
    """No locale, no home, no entry in the list of users, and processes that do not begin as copies: images
    that one of them loads make the same weights."""
    (tmp_path / "sitecustomize.py").write_text(BARE.format(start=start), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, "photos")
    given = typed("train", model="small-cnn", strategy="vanilla", patch=5, epochs=1, device="cpu")
    assert cli(*given, data=photos, val_data=photos, out=tmp_path / "one").code == 0
    for name, data in (("folder", photos), ("tar", tmp_path / "photos.tar"))[start == "spawn" :]:
        options = typed(*given, data=data, val_data=data, workers=1, out=tmp_path / name)
        done = run(*options, PYTHONPATH=path, **NO_HOME, **NO_LOCALE)
        assert done.returncode == 0, done.stderr
        weights = [(tmp_path / one / "model.safetensors").read_bytes() for one in ("one", name)]
        assert weights[0] == weights[1]


def test_every_data_set_can_be_sent_to_a_process(photos: Path, tmp_path: Path):
    """Where processes are spawned, images and their transform are pickled."""
    spec = describe("test_efficientnet", classes=("blue", "green", "red"), num_classes=3)
    for source in (load_source(str(photos)), load_source("digits"), load_source("digits").first(3)):
        images = Images(source, spec)
        sent = pickle.loads(pickle.dumps(images))
        assert torch.equal(sent[1].readable(), images[1].readable())


RUN_EACH = """
import json, sys
from certipatch.cli.app import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, words
"""


def test_text_is_utf_8_wherever_it_is_read_or_written(trained: Path, photos: Path, tmp_path: Path):
    """Python names each place of ours that would take the encoding of the locale."""
    given = typed(model=trained, data=photos, patch=5, masks_per_axis=2, out=tmp_path / "c", limit=3)
    (tmp_path / "run.toml").write_text("json = true", encoding="utf-8")
    attacked = typed(model=trained, data=photos, records=tmp_path / "c", out=tmp_path / "a", limit=2)
    words = [
        ["certify", *given],
        ["attack", *attacked],
        ["report", tmp_path / "c", "--html", tmp_path / "page.html", "--figures", tmp_path / "figures"],
        ["verify", tmp_path / "c", "--config", tmp_path / "run.toml"],
    ]
    script = [sys.executable, "-X", "warn_default_encoding", "-W", "always::EncodingWarning", "-c", RUN_EACH]
    asked = json.dumps([[str(word) for word in line] for line in words])
    done = subprocess.run([*script, asked], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "EncodingWarning" in line]
    assert not [line for line in warned if f"certipatch{os.sep}" in line], warned


def test_no_file_of_ours_leaves_the_encoding_to_the_locale():
    """ruff knows the calls; this one rule of it is in preview, so it is asked for by name."""
    root = Path(__file__).parents[2]
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--preview", "--select", "PLW1514"]
    done = subprocess.run([*ruff, root / "src", root / "scripts", root / "benchmarks"], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("path", ["no/such", r"no\such", r"C:\no\such"])
def test_paths_have_either_separator(cli, photos: Path, tmp_path: Path, path: str):
    given = typed("certify", patch=5, out=tmp_path / "c")
    assert f"no training run at {path}" in cli(*given, model=path, data=photos).err
    assert "no such file or folder" in cli(*given, model="small-cnn", data=path, weights="x").err


def test_names_in_records_have_one_separator(photos: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a system joins paths by another one, the fingerprint of the same images is the same."""
    here = load_source(str(photos))
    monkeypatch.setattr(os.path, "join", lambda *parts: "\\".join(parts))
    assert load_source(str(photos)).fingerprint() == here.fingerprint()


def test_no_home_folder(trained: Path, photos: Path, tmp_path: Path):
    """A container whose user is in no list of users; only a download needs a place to go."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef missing(*_): raise KeyError('no such user')\npwd.getpwuid = pwd.getpwnam = missing\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    given = typed(model=trained, data=photos, patch=5, masks_per_axis=2, out=tmp_path / "c", limit=3)
    done = run("certify", *given, PYTHONPATH=path, **NO_HOME)
    assert done.returncode == 0, done.stderr
    given = typed(model=trained, data="torch/cifar10", patch=5, out=tmp_path / "d")
    done = run("certify", *given, PYTHONPATH=path, **NO_HOME)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done.stderr
    assert "set CERTIPATCH_DATA" in done.stderr
