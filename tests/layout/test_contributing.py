"""What CONTRIBUTING.md and docs/new-defense.md say about where things are is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "new-defense.md")
PATH = re.compile(r"`((?:src|tests|docs|scripts)/[\w./-]+)`")
NAMED = re.compile(
    r"`(src/certipatch/[\w/]+\.py)`: `(\w+)` and `(\w+)`|`(\w+)` in `(src/certipatch/[\w/]+\.py)`"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_paths_exist(page: Path):
    paths = PATH.findall(page.read_text(encoding="utf-8"))
    assert len(paths) >= 8
    for path in paths:
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_ten_questions_have_a_path_each():
    text = PAGES[0].read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if re.match(r"\| (Where|What|How) ", row)]
    assert len(rows) == 10
    for row in rows:
        question, answer = row.strip("|").split("|")
        assert question.strip().endswith("?")
        assert PATH.search(answer)


def test_the_names_are_in_the_files():
    """Algorithms 1 and 2, the record of an attack: a definition stands where the page says."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = [
        (path, name)
        for path, one, other, third, at in NAMED.findall(text)
        for path, name in ([(path, one), (path, other)] if path else [(at, third)])
    ]
    assert len(found) >= 4
    for path, name in found:
        code = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {name}\b", code, flags=re.MULTILINE), f"{name} in {path}"


def test_the_toy_defense_is_as_small_as_the_page_says():
    files = [ROOT / "tests/defenses/toy" / name for name in ("votes.py", "defense.py")]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    (said,) = re.findall(r"is a whole one, (\d+) lines long", PAGES[1].read_text(encoding="utf-8"))
    assert abs(lines - int(said)) <= 20
