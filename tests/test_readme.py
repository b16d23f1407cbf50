"""What the README and the docs tell a newcomer to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]


def blocks(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", path.read_text(), flags=re.DOTALL)


BLOCKS = blocks(ROOT / "README.md")
COMMANDS = [
    line
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for kind, block in blocks(path)
    if kind == "sh"
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("certipatch ")
]


def test_quick_start_on_the_command_line(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for kind, block in BLOCKS if kind == "sh" and "--data digits" in block)
    for line in block.splitlines():
        done = cli(*shlex.split(line, comments=True)[1:])
        assert done.code == 0, (line, done.err)
    assert "small-cnn" in done.out


def test_quick_start_in_python(capsys: pytest.CaptureFixture[str]):
    (block,) = (block for kind, block in BLOCKS if kind == "python")
    scope: dict[str, object] = {}
    exec(block, scope)
    assert len(scope["verdicts"]) == 2
    assert [tuple(windows.shape) for windows in scope["copies"]] == [(2, 2, 4)] * 2


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_has_the_options_it_is_shown_with(line: str):
    from certipatch.cli import app

    command, *arguments = shlex.split(line, comments=True)[1:]
    known = typer.main.get_command(app).commands[command]
    known.make_context(command, arguments)
