"""Commands of several processes, one of which is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def kill_process_1(arguments: list[object], when: Path) -> SimpleNamespace:
    """Start a command that has a second process, and kill that one as soon as the file ``when`` exists.

    Returns the exit code, stdout and stderr of the first.
    """
    command = [sys.executable, "-m", "certipatch", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        deadline, child = time.monotonic() + 90, ""
        while not when.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            child = child or _child_of(process)
            time.sleep(0.005)
        os.kill(int(child), signal.SIGKILL)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def _child_of(process: subprocess.Popen[str]) -> str:
    """The number of the process that a run has started, or nothing while there is none."""
    asked = ["pgrep", "-f", "-P", str(process.pid), "certipatch"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout
