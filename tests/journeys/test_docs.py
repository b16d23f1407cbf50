"""The documentation site is built without a warning, asks the network for nothing, and says of the code what
it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
from filelock import FileLock

import certipatch
from certipatch.cli.app import app
from certipatch.records.schema import (
    AttackRecord,
    DetectionRecord,
    Indexed,
    IntervalRecord,
    PatchCleanserRecord,
    WindowRecord,
)
from documentation import PAGES, ROOT

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
EXTERNAL = {"http", "https", "mailto"}


class Links(HTMLParser):
    """What a page has: its anchors, where it links to, and what it loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        has = {key: value or "" for key, value in attributes}
        self.anchors |= {has[key] for key in ("id", "name") if key in has}
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        self.loads += [has["src"]] if "src" in has else [has["href"]] if tag == "link" else []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[Path, Links]:
    """The pages of the site, which the first of pytest's workers to come here builds for all."""
    pytest.importorskip("sphinx", reason="the documentation tools are not installed: pip install '.[docs]'")
    shared = tmp_path_factory.getbasetemp()
    to = (shared if worker_id == "master" else shared.parent) / "site"
    with FileLock(f"{to}.lock"):
        if not to.exists():
            command = [sys.executable, "scripts/docs_site.py", f"{to}.part"]
            built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert built.returncode == 0, built.stdout + built.stderr
            Path(f"{to}.part").rename(to)
    return {page: Links(page) for page in to.rglob("*.html")}


def test_the_site_asks_the_network_for_nothing(site: dict[Path, Links]):
    loads = [(page.name, loaded) for page, links in site.items() for loaded in links.loads]
    assert len(loads) > 100
    assert not [
        (page, loaded)
        for page, loaded in loads
        if urlsplit(loaded).scheme not in ("", "data") or loaded.startswith("//")
    ]
    root = next(page.parent for page in site if page.name == "search.html")
    assert not re.search(
        r"@import|url\(\s*['\"]?(https?:)?//", "".join(sheet.read_text() for sheet in root.rglob("*.css"))
    )


def test_links_inside_the_site_lead_somewhere(site: dict[Path, Links]):
    """Strict mode checks what Markdown says; this checks what came of it, generated pages included."""
    seen = 0
    for page, links in site.items():
        for link in links.links:
            parts = urlsplit(link)
            if parts.scheme in EXTERNAL:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), f"{page.name}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in site[target].anchors, f"{page.name}: {link}"
            seen += 1
    assert seen > 500


def test_links_to_other_places_are_well_formed(site: dict[Path, Links]):
    """Whether they are there cannot be seen offline."""
    found = {link for links in site.values() for link in links.links if urlsplit(link).scheme in EXTERNAL}
    assert found
    for link in found:
        assert re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[\w./#~%-]*)?", link), link


def test_links_of_the_readme_work_on_github():
    """There a heading's anchor is its words in lower case, joined by hyphens, without punctuation."""
    seen = 0
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (page.parent / path).read_text(), flags=re.MULTILINE)
                assert anchor in {
                    re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
                }, target
            seen += 1
    assert seen > 50


def test_the_reference_names_all_that_is_public(site: dict[Path, Links]):
    (api,) = (links for page, links in site.items() if page.name == "api.html")
    assert {f"certipatch.{name}" for name in certipatch.__all__} <= api.anchors
    assert {"certipatch.PatchCleanser.certify", "certipatch.MaskSet.covering"} <= api.anchors


def test_the_reference_names_every_option(site: dict[Path, Links]):
    (page,) = (page for page in site if page.name == "cli.html")
    sections = dict(
        re.findall(
            r'<section id="certipatch-(\w+)">(.*?)(?=<section|</article)', page.read_text(), flags=re.DOTALL
        )
    )
    commands = typer.main.get_command(app).commands
    assert set(sections) == set(commands)
    for name, command in commands.items():
        for option in command.params:
            if not getattr(option, "hidden", False):
                assert option.opts[0] in sections[name] or option.name.upper() in sections[name], (
                    name,
                    option.name,
                )


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium, or CHROMIUM=path")
def test_the_search_works_from_a_folder(site: dict[Path, Links]):
    """Opened as a file, without a server, and without asking anyone."""
    playwright = pytest.importorskip("playwright.sync_api", reason="not installed: pip install '.[dev]'")
    (index,) = (page for page in site if page.name == "index.html")
    asked: list[str] = []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(index.as_uri())
        page.fill("input[name=q]", "challenger masking")
        page.keyboard.press("Enter")
        page.wait_for_selector("ul.search li")
        found = page.inner_text("ul.search li:first-child")
        page.click("ul.search li:first-child a")
        page.wait_for_url("**/theory.html*challenger-masking")
        browser.close()
    assert found == "Theory > Challenger masking"
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked


def printed_by(name: str) -> str:
    """What a notebook of the examples prints; an error in a cell is raised."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient", reason="not installed: pip install '.[dev]'")
    path = ROOT / "examples" / f"{name}.ipynb"
    assert path.stat().st_size < 100_000
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_quick_start_runs():
    found = re.findall(r"certified robust (\d+) of 200", printed_by("quickstart"))
    vanilla, tuned = map(int, found)
    assert 0 < vanilla < tuned


@pytest.mark.parametrize("name", [pytest.param("own_photographs", marks=pytest.mark.slow), "timm_model"])
def test_a_notebook_runs(name: str):
    printed = printed_by(name)
    (certified,) = re.findall(r"certified robust (\d+) of 48", printed)
    assert int(certified) > 0
    if name == "own_photographs":
        assert "exit code 0" in printed
        assert '"class": "flower"' in printed


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("A record of `certify`", PatchCleanserRecord),
        ("A record of `attack`", AttackRecord),
        ("A record of `certify` by windows", WindowRecord),
        ("A record of `certify` by bounds", IntervalRecord),
        ("A record of `detect`", DetectionRecord),
    ],
)
def test_every_field_of_a_record_is_explained(heading: str, kind: type[Indexed]):
    text = (ROOT / "docs/records.md").read_text()
    marks = re.escape(f"<!-- schema: records.schema.{kind.__name__} -->")
    (section,) = re.findall(rf"^## {heading}\n(.*?){marks}", text, flags=re.DOTALL | re.MULTILINE)
    explained = {
        field
        for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
        for field in re.findall(r"`(\w+)`", row)
    }
    if kind in (DetectionRecord, WindowRecord, IntervalRecord):  # the rest is "as above"
        explained |= set(re.findall(r"`(\w+)`", section.strip().splitlines()[0]))
    assert explained == set(kind.model_fields)
