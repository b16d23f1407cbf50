"""The documentation site: python scripts/docs_site.py OUT (make docs), then open OUT/index.html.

``write_pages`` makes a folder of plain Markdown of docs/, which Sphinx turns into the site (docs/conf.py; any
warning is an error). In the folder

* ``cli.md`` has what typer writes about the commands, ``records.md`` the JSON schema of each kind of record
  and manifest, and ``theory.md`` the source of its functions;
* a file of the repository that a page links to, as on GitHub, lies under ``repository/``;
* ``index.md`` has the order of the pages, ``NAVIGATION``.
"""

import argparse
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAVIGATION = {
    "Tutorials": ["own-images", "own-model", "timm-model", "cluster", "serving", "export"],
    "What it promises": [
        "threat-model",
        "theory",
        "assumptions",
        "comparators",
        "trust",
        "attacks",
        "faq",
    ],
    "Measured": ["choosing", "benchmarks", "reproducing"],
    "Reference": ["cli", "api", "records", "models", "new-defense", "repository/CHANGELOG"],
}
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)")
COMMANDS = "<!-- commands -->"
GENERATED = re.compile(r"<!-- (schema|source): ([\w.]+)\.(\w+) -->")


def write_pages(to: Path) -> None:
    """Write the Markdown of the site, and what it shows, into the folder."""
    shutil.copytree(DOCS, to, ignore=shutil.ignore_patterns("conf.py", "static"))
    pages = {path.relative_to(to).as_posix(): _of_docs(path) for path in sorted(to.glob("*.md"))}
    pages["index.md"] += _navigation()
    outside = ["CHANGELOG.md"]
    for page in pages:
        outside += _linked(page)
    for path in outside:  # it grows
        target = to / "repository" / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, target)
        if path.endswith(".md") and f"repository/{path}" not in pages:
            in_navigation = f"repository/{path.removesuffix('.md')}" in NAVIGATION["Reference"]
            pages[f"repository/{path}"] = ("" if in_navigation else "---\norphan: true\n---\n") + (
                ROOT / path
            ).read_text(encoding="utf-8")
            outside += _linked(f"repository/{path}")
    for page, text in pages.items():
        (to / page).write_text(_with_links_moved(page, text), encoding="utf-8")


def _of_docs(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    text = GENERATED.sub(
        lambda found: {"schema": _schema, "source": _source}[found[1]](*found.groups()[1:]), text
    )
    return text.replace(COMMANDS, _commands()) if COMMANDS in text else text


def _navigation() -> str:
    trees = [
        f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```\n"
        for title, pages in NAVIGATION.items()
    ]
    return "".join(trees)


def _linked(page: str) -> list[str]:
    """The files of the repository, outside of docs/, that a page of the site links to."""
    text = (_in_repository(page)).read_text(encoding="utf-8")
    targets = {_target(page, target) for _, target in LINK.findall(text)}
    return sorted(
        target for target in targets if not target.startswith("docs/") and (ROOT / target).is_file()
    )


def _in_repository(page: str) -> Path:
    """Where a page of the site comes from."""
    return ROOT / page.removeprefix("repository/") if page.startswith("repository/") else DOCS / page


def _target(page: str, target: str) -> str:
    """The path in the repository of a link's target."""
    folder = _in_repository(page).parent.relative_to(ROOT).as_posix()
    return PurePosixPath(os.path.normpath(f"{folder}/{target}")).as_posix()


def _with_links_moved(page: str, text: str) -> str:
    def moved(link: re.Match[str]) -> str:
        target = _target(page, link[2])
        there = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        return link[1] + PurePosixPath(os.path.relpath(there, PurePosixPath(page).parent)).as_posix()

    return LINK.sub(moved, text)


def _commands() -> str:
    """Every command with its options, by typer itself."""
    command = [sys.executable, "-m", "typer", "certipatch.cli.app", "utils", "docs", "--name", "certipatch"]
    text = subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", env=_environment()
    ).stdout
    return text[text.index("## ") :]  # behind the title and the list of commands


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUTF8": "1"}


def _schema(module: str, name: str) -> str:
    """The JSON schema of a pydantic model."""
    model: Any = getattr(import_module(f"certipatch.{module}"), name)
    return _folded(
        f"JSON schema of <code>{name}</code>", "json", json.dumps(model.model_json_schema(), indent=2)
    )


def _source(module: str, name: str) -> str:
    """The source of a function, or of a method of a class."""
    owner, _, attribute = module.rpartition(".")
    found: Any = getattr(import_module(owner), attribute) if attribute[0].isupper() else import_module(module)
    code = inspect.cleandoc("\n" + inspect.getsource(getattr(found, name)))
    return _folded(f"Source of <code>{name}</code>", "python", code)


def _folded(summary: str, language: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n```{language}\n{text}\n```\n\n</details>"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the site; an older site in it is replaced")
    out = parser.parse_args().out
    sys.path.insert(0, str(ROOT / "src"))
    if (out / "index.html").exists():
        shutil.rmtree(out)
    with tempfile.TemporaryDirectory() as scratch:
        pages = Path(scratch, "pages")
        write_pages(pages)
        command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning"]
        command += ["--conf-dir", str(DOCS), "--doctree-dir", str(Path(scratch, "doctrees"))]
        return subprocess.run([*command, str(pages), str(out)], check=False, env=_environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
