"""certify, detect, attack and verify on Ray workers: a folder is byte for byte what one process writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from inputs import typed, write_photos

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.slow  # each start of Ray takes seconds

RAY = ["--engine", "ray", "--address", "local", "--devices-per-node", "2"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Four blocks of images, one of which cannot be read."""
    folder = write_photos(tmp_path_factory.mktemp("many"), each=34)
    (folder / "green" / "5.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def one(trained, many, tmp_path_factory):
    """The folder that one process writes."""
    out = tmp_path_factory.mktemp("one") / "certified"
    run("certify", trained, many, out, "--patch", 5, "--masks-per-axis", 3)
    return out


def run(command, model, data, out, *options, code=0, **environment):
    words = typed(command, *options, model=model, data=data, out=out)
    done = subprocess.run(
        [sys.executable, "-m", "certipatch", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**ENVIRONMENT, **environment},
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr)


def same(one, two, name="records.jsonl"):
    assert (one / name).read_bytes() == (two / name).read_bytes()


DEADLY = """
import os, signal, sys
import torch
from certipatch.models.small import SmallCNN

seen = []

class Deadly(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = SmallCNN(3)

    def forward(self, images):
        seen.append(len(images))
        if "default_worker" in sys.argv[0] and len(seen) == 60:  # within a block
            try:
                open(os.environ["KILLED"], "x").close()
            except FileExistsError:
                return self.body(images)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.body(images)

def network():
    return Deadly().eval()
"""


def test_certify_while_a_worker_is_killed(many, tmp_path):
    """The first worker that has looked at 60 batches dies; its block is done again, and nothing else."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    path = f"{tmp_path}:{ENVIRONMENT.get('PYTHONPATH', '')}"
    here = {"PYTHONPATH": path, "KILLED": str(tmp_path / "killed")}
    asked = ["--patch", 5, "--masks-per-axis", 3, "--image-size", 32, "--batch-size", 8]
    run("certify", "deadly:network", many, tmp_path / "one", *asked, **here)
    done = run("certify", "deadly:network", many, tmp_path / "two", *asked, *RAY, "--json", **here)
    assert (tmp_path / "killed").exists()
    assert "has ended (killed, or out of memory?)" in done.err
    assert json.loads(done.out)["complete"]
    same(tmp_path / "one", tmp_path / "two")
    environment = json.loads((tmp_path / "two" / "manifest.json").read_text())["environment"]
    assert environment["engine"].startswith("ray 2.")
    assert 1 <= len(environment["workers"]) <= 3
    for worker in environment["workers"]:
        assert (worker["device"], worker["threads"], worker["network"]["batch_size"]) == ("cpu", 1, 8)
        assert worker["versions"] == environment["versions"]


def test_detect(trained, many, tmp_path):
    asked = ["--patch", 5, "--masks-per-axis", 3]
    run("detect", trained, many, tmp_path / "one", *asked)
    run("detect", trained, many, tmp_path / "two", *asked, *RAY)
    same(tmp_path / "one", tmp_path / "two")


def test_attack_and_verify(trained, many, one, tmp_path):
    asked = ["--records", one, "--limit", 40, "--restarts", 2, "--steps", 2]
    run("attack", trained, many, tmp_path / "one", *asked)
    run("attack", trained, many, tmp_path / "two", *asked, *RAY)
    same(tmp_path / "one", tmp_path / "two", "attacks.jsonl")
    pictures = sorted((tmp_path / "one" / "patched").iterdir())
    assert len(pictures) > 10
    for picture in pictures:
        same(tmp_path / "one", tmp_path / "two", f"patched/{picture.name}")
    words = ["verify", tmp_path / "two", "--records", one, "--model", trained, "--data", many, *RAY, "--json"]
    command = [sys.executable, "-m", "certipatch", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["recomputed"], found["findings"]) == (20, [])
