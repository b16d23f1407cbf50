"""The bench that kills, fills and damages runs finds nothing wrong; `make faults` does more of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fault_bench.py"


@pytest.mark.slow
def test_a_few_of_each(tmp_path: Path):
    command = [sys.executable, "-W", "ignore", SCRIPT, "--quick", "--out", tmp_path / "faults.json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "faults.json").read_text())
    assert all(row["injected"] > 0 and not row["failures"] for row in rows if not row["skipped"])
    assert sum("SIGKILL" in row["fault"] for row in rows) == 8
    assert "0 failed" in done.stdout
