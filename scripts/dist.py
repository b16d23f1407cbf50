"""``make dist``: wheel and sdist, checked; the wheel in an empty environment; the demo.

Each step is timed; the environments are in a temporary folder. ``--no-demo`` stops after the checks.
"""

import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def step(what: str, *command: object, cwd: Path = ROOT) -> None:
    """Run a command; say how long it took, or end if it fails."""
    started = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, cwd=cwd)
    print(f"{what}: {time.perf_counter() - started:.0f} s", flush=True)


def environment(folder: Path) -> Path:
    """A new empty environment; its Python."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def main() -> None:
    for old in DIST.glob("certipatch-*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as where:
        tools = environment(Path(where) / "tools")
        step("tools", tools, "-m", "pip", "install", "--quiet", "build", "twine")
        step("build", tools, "-m", "build", "--outdir", DIST, ROOT)
        made = sorted(DIST.glob("certipatch-*"))
        step("check", tools, "-m", "twine", "check", "--strict", *made)
        if "--no-demo" in sys.argv:
            return
        (wheel,) = DIST.glob("*.whl")
        python = environment(Path(where) / "empty")
        step("install", python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        step("checks", python, "-m", "certipatch", "checks", cwd=Path(where))
        step("demo", python, "-m", "certipatch", "demo", cwd=Path(where))
        size = (Path(where) / "demo-out" / "report.html").stat().st_size
        print(f"page: {size:,} bytes")


if __name__ == "__main__":
    main()
