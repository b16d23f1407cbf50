"""certify, detect, attack and verify on Ray workers: a folder is byte for byte what one process writes."""

from __future__ import annotations

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


KILLED = """
import os, signal
from pathlib import Path
from certipatch.models.small import small_cnn

def network(num_classes):
    model, flag = small_cnn(num_classes), Path(os.environ["KILLED"])

"""


def test_certify_with_a_worker_that_is_killed(trained, many, one, tmp_path):
    """The first worker that has a record to write dies by SIGKILL, in its second block."""
    out = tmp_path / "two"
    words = typed("certify", *RAY, model=trained, data=many, patch=5, masks_per_axis=3, out=out)
    process = subprocess.Popen(
        [sys.executable, "-m", "certipatch", *map(str, words), "--exhaustive"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
