"""What MkDocs does not do by itself for our site (mkdocs.yml).

* ``cli.md`` gets what typer writes about the commands, ``records.md`` the JSON schema of each kind of record
  and manifest.
* A page may link to a file of the repository, as it does on GitHub. The file comes along, under
  ``repository/``.
* ``$...$`` becomes MathML, which browsers draw by themselves. An option (``--limit``) stays on one line.
"""

import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)")
COMMANDS = "<!-- commands -->"
SCHEMA = re.compile(r"<!-- schema: ([\w.]+)\.(\w+) -->")
ROLE = re.compile(r":(?:func|class|meth|attr):(?=`)")
NAMES = re.compile(r"^( {4,})(\w+(?:, \w+)+): (.*)", flags=re.MULTILINE)
EXAMPLE = re.compile(r"^>>> .+(?:\n.+)*", flags=re.MULTILINE)
OPTION = re.compile(r"(?<=[\s>])--[a-z][a-z-]*")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)


class Readable(griffe.Extension):
    """Docstrings as Markdown: examples become code, roles go, several names on one line get one each."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = EXAMPLE.sub(r"```pycon\n\g<0>\n```", ROLE.sub("", obj.docstring.value))
            obj.docstring.value = NAMES.sub(
                lambda line: "\n".join(f"{line[1]}{name}: {line[3]}" for name in line[2].split(", ")), text
            )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    outside = [
        "CHANGELOG.md",
        *(path for file in files.documentation_pages() if file.abs_src_path for path in _linked(file)),
    ]
    for path in outside:  # it grows
        name = f"repository/{path}"
        if files.get_file_from_path(name) is None:
            in_nav = InclusionLevel.INCLUDED if path == "CHANGELOG.md" else InclusionLevel.NOT_IN_NAV
            files.append(
                file := File.generated(config, name, abs_src_path=str(ROOT / path), inclusion=in_nav)
            )
            outside += _linked(file)
    return files


def _linked(file: File) -> list[str]:
    """The files of the repository, outside of docs/, that a page links to."""
    if not file.src_uri.endswith(".md"):
        return []
    targets = {_of_repository(file, target) for _, target in LINK.findall(file.content_string)}
    return sorted(
        target for target in targets if not target.startswith("docs/") and (ROOT / target).is_file()
    )


def _of_repository(file: File, target: str) -> str:
    """The path in the repository of a link's target."""
    at = file.src_uri.removeprefix("repository/")
    return os.path.normpath(PurePosixPath(at if at != file.src_uri else f"docs/{at}").parent / target)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def moved(link: re.Match[str]) -> str:
        target = _of_repository(page.file, link[2])
        there = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        return link[1] + os.path.relpath(there, PurePosixPath(page.file.src_uri).parent)

    markdown = SCHEMA.sub(lambda found: _schema(*found.groups()), LINK.sub(moved, markdown))
    return markdown.replace(COMMANDS, _commands()) if COMMANDS in markdown else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    html = OPTION.sub(r'<span class="option">\g<0></span>', html)
    return FORMULA.sub(
        lambda found: convert(unescape(found[3]).strip(), display="block" if found[2] == "[" else "inline"),
        html,
    )


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    return _fetching_nothing(output)


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    return _fetching_nothing(output_content)


def _fetching_nothing(output: str) -> str:
    """A page that asks nobody: what Material's plugin "offline" takes from elsewhere is our search.js."""
    ours = re.search(r'<script src="[^"]*search\.js"></script>', output)
    if ours is None:
        return output
    elsewhere = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
    return output.replace(ours[0], "").replace(elsewhere, ours[0])


def _commands() -> str:
    """Every command with its options, by typer itself."""
    command = [sys.executable, "-m", "typer", "certipatch.cli.app", "utils", "docs", "--name", "certipatch"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return text[text.index("## ") :]  # behind the title and the list of commands


def _schema(module: str, name: str) -> str:
    """The JSON schema of a pydantic model, folded."""
    model: Any = getattr(__import__(f"certipatch.{module}", fromlist=[name]), name)
    lines = json.dumps(model.model_json_schema(), indent=2).splitlines()
    return "\n".join(
        [
            f'??? abstract "JSON schema of `{name}`"',
            "    ```json",
            *(f"    {line}" for line in lines),
            "    ```",
        ]
    )
