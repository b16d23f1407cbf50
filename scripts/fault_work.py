"""What the bench of faults works with.

That is: a command in a process of its own, what it leaves when nothing disturbs it, and a row of counts.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from certipatch.cli.app import main as command_line
from certipatch.records.manifest import MANIFEST, read_manifest
from certipatch.records.read import read_lines
from certipatch.records.schema import EPOCHS, RECORDS

PATIENCE = 7200  # seconds for one process, on a machine that may be busy with other things, or pause this one
LINES = {"certify": RECORDS, "train": EPOCHS}


@dataclass
class Row:
    """One kind of fault: how often it was injected, and what became of it."""

    fault: str
    injected: int = 0
    survived: int = 0  # or detected
    harmless: int = 0
    skipped: str = ""
    failures: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)  # of what was harmless

    def count(self, problem: str | None, *, harmless: bool = False) -> None:
        """An injection with what went wrong, if anything."""
        self.injected += 1
        if problem is not None:
            self.failures.append(problem)
            print(f"FAILED: {self.fault}: {problem}", file=sys.stderr, flush=True)
        elif harmless:
            self.harmless += 1
        else:
            self.survived += 1


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def complaint(self, *words: str, code: int = 2) -> str | None:
        """None if this is one line, this exit code and one of the words; else what it is."""
        lines = [line for line in self.err.splitlines() if line.startswith("certipatch:")]
        if (
            self.code != code
            or len(lines) != 1
            or "Traceback" in self.err
            or not any(word in lines[0] for word in words)
        ):
            return (
                f"expected one line with {' or '.join(words)}, found exit code {self.code}: {self.err[-500:]}"
            )
        return None


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "certipatch", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=PATIENCE)
    return Outcome(process.returncode, out, err)


def call(*arguments: object) -> Outcome:
    """The command line in this process, which is quicker."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["certipatch", *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Work:
    """A command, and what it leaves in its folder when nothing disturbs it."""

    arguments: tuple[object, ...]
    whole: Path
    seconds: float = 0.0
    seconds_to_manifest: float = 0.0

    @classmethod
    def undisturbed(cls, whole: Path, *arguments: object) -> Work:
        began, process, seen = time.monotonic(), start(*arguments, "--out", whole), 0.0
        while process.poll() is None:
            seen = seen or ((whole / MANIFEST).exists() and time.monotonic() - began) or 0.0
            time.sleep(0.005)
        done = end(process)
        assert done.code == 0, done.err
        return cls(arguments, whole, time.monotonic() - began, seen)

    @property
    def lines(self) -> str:
        return LINES[str(self.arguments[0])]

    def start(self, folder: Path, *, resume: bool = False) -> subprocess.Popen[str]:
        return start(*self.arguments, "--out", folder, *(["--resume"] if resume else []))

    def resume(self, folder: Path, *, quick: bool = False) -> Outcome:
        if quick:
            return call(*self.arguments, "--out", folder, "--resume")
        return end(self.start(folder, resume=True))

    def difference(self, folder: Path) -> str | None:
        """What is not as in the undisturbed run; None if nothing."""
        here, there = read_manifest(folder), read_manifest(self.whole)
        if here.finished is None or there.finished is None:
            return "not finished"
        if self.lines == RECORDS:
            same = (folder / self.lines).read_bytes() == (self.whole / self.lines).read_bytes()
            stated_alike = here.finished["sha256"] == there.finished["sha256"]
            return None if same and stated_alike else "other records"
        untimed = [
            [{**line, "seconds": 0} for line in read_lines(place / self.lines)]
            for place in (folder, self.whole)
        ]
        if untimed[0] != untimed[1]:
            return "other lines of epochs"
        weights = [(place / "model.safetensors").read_bytes() for place in (folder, self.whole)]
        stated_alike = here.finished["weights_sha256"] == there.finished["weights_sha256"]
        return None if weights[0] == weights[1] and stated_alike else "other weights"

    def resumed(self, folder: Path) -> str | None:
        """Resume and compare: what is wrong, or None."""
        done = self.resume(folder)
        return f"resume: {done.err[-500:]}" if done.code else self.difference(folder)


def complete_lines(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def wait_until(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Until ``ready()``, or the process has ended."""
    while process.poll() is None and not ready():
        time.sleep(0.001)
