"""Records are read and reported where torch is not installed: on the laptop of whoever reads them.

Their needs are numpy, scipy, pydantic, Pillow, Matplotlib, Jinja2, rich, typer and filelock.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECORDS = Path(__file__).parents[1] / "records" / "format-1"
HEAVY = ("torch", "torchvision", "timm", "lightning_fabric", "captum", "safetensors", "sklearn")
SCRIPT = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from certipatch.cli.app import main
main()
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *map(str, words)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def test_report(tmp_path: Path):
    """A table, and a page and figures but for the pictures, which a model's transform makes."""
    folders = [RECORDS / name for name in ("certified", "attacked", "detected")]
    written = ["--html", tmp_path / "page.html", "--figures", tmp_path / "figures"]
    done = run("report", *folders, *written, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[0]["certified_robust_accuracy"]["count"] == 2
    assert "certified" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "pictures" in done.stderr
    assert list((tmp_path / "figures").glob("*.svg"))


@pytest.mark.parametrize(
    "words", [["--help"], ["masks", "--image-size", 32, "--patch", 3], ["report", RECORDS / "certified"]]
)
def test_what_needs_integers_only(words: list[object]):
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words", [["checks"], ["certify", "--model", "x", "--data", "digits", "--patch", "3", "--out", "z"]]
)
def test_the_rest_says_what_is_missing(words: list[object], tmp_path: Path):
    done = run(*words)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert "pip install certipatch" in done.stderr
