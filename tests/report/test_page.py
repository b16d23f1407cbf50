"""The report page: its numbers are those of the records, it is complete in itself, and nothing in it is
obeyed.

What it does in a browser is in test_page_in_browser.py.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from certipatch.config import DataAsked
from certipatch.errors import CertiPatchError
from certipatch.geometry.masks import MaskSet
from certipatch.records.read import read_folder, read_records
from certipatch.records.schema import RECORDS
from certipatch.report.certification import Summary, summarize
from certipatch.report.compared import compare
from certipatch.report.curves import against_k, against_patch
from certipatch.report.findings import failing_pairs, heat, of_classes, outcome, telling
from certipatch.report.page.html import write_page
from inputs import typed, write_manifest, write_photos
from invented import HOSTILE, certification


def page_of(out: Path, *folders: Path, data: DataAsked | None = None) -> list[str]:
    """Write the page of some folders; a line for each thing that is not shown."""
    return write_page(out, compare([read_folder(folder) for folder in folders]), data)


def summary_of(folder: Path) -> Summary:
    return summarize(read_folder(folder))


class Page(HTMLParser):
    """Elements with their attributes, the visible text, and what stands in script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.visible: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = tag
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in self.inside:
            self.inside[self._in][-1] += data
        else:
            self.visible.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.visible).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certification(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "page.html"
    notes = page_of(out, folder)
    assert len(notes) == 1
    assert "not shown" in notes[0]
    return Page(out.read_text())


def test_numbers_are_those_of_the_records(page: Page, folder: Path):
    records = read_records(folder)
    certified = sum(record.certified for record in records)
    assert f"No, proven, for {certified} of 60 images" in page.text
    for count in (
        sum(r.vanilla_label == r.label for r in records),
        sum(r.defended_label == r.label for r in records),
        certified,
    ):
        assert f"{100 * count / 60:.1f} % {count}/60" in page.text.replace("\xa0", " ")
    assert (
        f"{sum(record.error is not None for record in records)} unreadable images count as not certified"
        in page.text
    )
    assert hashlib.sha256((folder / RECORDS).read_bytes()).hexdigest() in page.text


def test_data_block_is_the_records(page: Page, folder: Path):
    records, (run,) = read_records(folder), json.loads(page.inside["script"][0])["runs"]
    assert run["images"]["name"] == [record.name for record in records]
    assert run["images"]["label"] == [record.label for record in records]
    assert [pair and tuple(pair) for pair in run["images"]["pair"]] == [
        record.failing_pair for record in records
    ]
    assert run["images"]["fails"] == [record.failing_label for record in records]
    assert run["classes"] == list(HOSTILE)


def test_nothing_hostile_is_markup(page: Page):
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any(
        tag in ("img", "iframe", "object", "link") and "x" in (a.get("src"), a.get("href"))
        for tag, a in page.elements
    )
    assert "49" not in page.text or "{{ 7*7 }}" in page.inside["script"][0], "a template was obeyed"


def test_page_is_complete_in_itself_and_says_so_to_the_browser(page: Page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
    assert "url(" not in page.inside["style"][0]
    assert "@import" not in page.inside["style"][0]
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.inside["script"][1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_cost_of_ten_thousand_images(tmp_path: Path):
    """The page stays small: it has a bounded number of elements and pictures, and about a hundred bytes an
    image."""
    many = tuple(f"class {n}" for n in range(1000))
    page_of(tmp_path / "a.html", certification(tmp_path / "run", images=10_000, classes=many))
    text = (tmp_path / "a.html").read_text()
    assert len(text) < 200 * 10_000
    assert len(Page(text).elements) < 500


def test_outcomes(folder: Path):
    for record in read_records(folder):
        found = outcome(record)
        assert (found == "certified") == record.certified
        assert (found == "unreadable") == (record.error is not None)
        if found == "just missed":
            assert record.failing_pair is not None
            assert record.failing_pair[0] != record.failing_pair[1]
        if found == "hopeless":
            assert record.failing_pair is not None
            assert record.failing_pair[0] == record.failing_pair[1]
    certified = next(record for record in read_records(folder) if record.certified)
    assert outcome(certified, min_margin=certified.margin) == "certified"
    assert outcome(certified, min_margin=certified.margin + 0.01) == "just missed"


def test_heat_counts_pixels(folder: Path):
    masks = MaskSet.covering(image_size=(32, 32), patch_size=(5, 5), masks_per_axis=3).to_json()["windows"]
    records = read_records(folder)
    expected = np.zeros((32, 32), dtype=int)
    for record in records:
        hidden = np.zeros((32, 32), dtype=bool)
        for mask in (record.failing_pair or ()) if record.vanilla_label == record.label else ():
            for top, left, height, width in masks[mask]:
                hidden[top : top + height, left : left + width] = True
        expected += hidden
    found = heat(failing_pairs(records), masks, (32, 32))
    pixels = np.repeat(np.repeat(found.counts, np.diff(found.rows), axis=0), np.diff(found.columns), axis=1)
    assert (pixels == expected).all()
    assert expected.max() > expected.min()


def test_pairs_and_classes_are_counted(folder: Path):
    records = read_records(folder)
    pairs = failing_pairs(records)
    assert dict(pairs) == Counter(
        r.failing_pair for r in records if r.failing_pair and r.vanilla_label == r.label
    )
    assert any(r.failing_pair and r.vanilla_label != r.label for r in records), (
        "wrong without a mask: no mask is to blame"
    )
    assert [n for _, n in pairs] == sorted((n for _, n in pairs), reverse=True)
    classes = of_classes(records)
    assert {one.label for one in classes} == {record.label for record in records}
    shares = [one.certified_robust_accuracy.count / one.certified_robust_accuracy.images for one in classes]
    assert shares == sorted(shares)
    for one in classes:
        group = [record for record in records if record.label == one.label]
        assert one.certified_robust_accuracy.images == len(group)
        assert one.certified_robust_accuracy.count == sum(record.certified for record in group)
        assert one.clean_accuracy.count == sum(record.defended_label == one.label for record in group)
        wrong = Counter(record.failing_label for record in group if record.failing_label is not None)
        assert all(wrong[label] == count for label, count in one.wrong)
        assert sum(count for _, count in one.wrong) + one.others == wrong.total()


def test_telling_images(folder: Path):
    records = read_records(folder)
    groups = telling(records, 4)
    assert set(groups) == {"certified", "just missed", "hopeless"}
    margins = sorted(record.margin for record in records if record.certified)
    assert [record.margin for record in groups["certified"]] == margins[:4]
    assert len({record.label for record in groups["hopeless"]}) == 4


def test_curves_join_only_what_belongs_together(tmp_path: Path):
    runs = [certification(tmp_path / f"{patch}-{k}", patch=patch, k=k) for patch in (3, 5, 7) for k in (2, 3)]
    other = certification(tmp_path / "other", images=50, patch=9, k=3)
    another = certification(tmp_path / "another", patch=9, k=2, weights="cd" * 32)
    summaries = [summary_of(run) for run in [*runs, other, another]]
    chart = against_patch(summaries)
    assert [(curve.name, [point.label for point in curve.points]) for curve in chart.curves] == [
        ("small-cnn, k=2", ["3x3", "5x5", "7x7"]),
        ("small-cnn, k=3", ["3x3", "5x5", "7x7"]),
    ]
    for curve, k in zip(chart.curves, (2, 3), strict=True):
        assert [point.share for point in curve.points] == [
            summary_of(tmp_path / f"{patch}-{k}").certified_robust_accuracy for patch in (3, 5, 7)
        ]
    assert len(against_k(summaries).curves) == 3
    assert against_patch(summaries[:2]) is None
    assert against_k(summaries[:1]) is None


def test_pictures_are_those_that_were_certified(cli, trained: Path, photos: Path, tmp_path: Path):
    given = typed(model=trained, data=photos)
    certified = tmp_path / "c" / "8x8-k3"
    done = cli("certify", *given, patch=8, masks_per_axis="2,3", limit=12, out=certified.parent)
    assert done.code == 0
    attack = cli("attack", *given, records=certified, steps=2, restarts=2, out=tmp_path / "a")
    assert attack.code == 0
    done = cli("report", tmp_path / "c", tmp_path / "a", html=tmp_path / "page.html", data=photos)
    assert (done.code, done.err) == (0, ""), done.err
    assert f"page: {tmp_path / 'page.html'}" in done.out.replace("\n", "")
    page = Page((tmp_path / "page.html").read_text())
    data = json.loads(page.inside["script"][0])
    records = {record.pixels for record in read_records(certified)}
    assert set(data["pictures"]) <= records
    assert len(data["pictures"]) >= 6
    for name, address in data["pictures"].items():
        assert hashlib.sha256(_pixels(address).tobytes()).hexdigest() == name
    assert all(set(run["picture"].values()) <= set(data["pictures"]) for run in data["runs"])
    assert "0 of" in page.text
    assert "certified images were broken" in page.text


def _pixels(address: str) -> np.ndarray:
    """(3, H, W) of a ``data:`` address."""
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", address).groups()
    assert kind == "png"
    return np.ascontiguousarray(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).transpose(2, 0, 1))


def test_bad_input_is_one_line(cli, trained: Path, photos: Path, tmp_path: Path, folder: Path):
    certified = tmp_path / "c"
    done = cli("certify", model=trained, data=photos, patch=8, masks_per_axis=2, limit=6, out=certified)
    assert done.code == 0
    others = write_photos(tmp_path / "others", each=1, size=40)
    for line, words in [
        (["report", certified, "--html", tmp_path], "expected a file to write"),
        (["report", certified, "--html", tmp_path / "none" / "a.html"], "expected a file to write"),
        (["report", certified, "--html", tmp_path / "a.html", "--data", others], "found others"),
        (["report", certified, "--data", photos], "expected --html or --figures with them"),
    ]:
        refused = cli(*line)
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert words in refused.err
    assert not (tmp_path / "a.html").exists()
    done = cli("report", folder, "--html", tmp_path / "b.html")
    assert done.code == 0
    assert done.err.count("\n") == 1
    assert "not shown" in done.err
    assert "\x1b" not in done.err


def test_a_folder_named_twice_is_one_row(cli, folder: Path):
    once, twice = cli("report", folder), cli("report", folder, folder)
    assert (once.code, twice.code) == (0, 0)
    assert twice.out == once.out


def test_a_training_folder_is_sent_to_certify(cli, trained: Path):
    refused = cli("report", trained)
    assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
    assert "run certify on it first" in refused.err


@pytest.mark.parametrize(
    ("size", "threat", "question"),
    [
        (32, {"patch_size": (2, 2)}, "Can a sticker of at most 2x2 pixels, anywhere"),
        (64, {"patch_size": (23, 23)}, "Can a sticker of at most 23x23 pixels, anywhere"),
        (
            32,
            {"patch_size": (3, 2), "other_patch_sizes": [(2, 3)]},
            "Can a sticker of at most 3x2 or 2x3 pixels, anywhere",
        ),
        (32, {"patch_size": (3, 3), "patches": 2}, "Can two stickers of at most 3x3 pixels each, anywhere"),
    ],
)
def test_the_question_is_about_what_was_certified(
    tmp_path: Path, size: int, threat: dict[str, Any], question: str
):
    """And it is about no more: not about two patches where it was one."""
    run = certification(tmp_path / "run", images=3)
    whole = json.loads((run / "manifest.json").read_text())
    whole["experiment"]["masks"] = MaskSet.covering(
        image_size=(size, size), masks_per_axis=3, **threat
    ).to_json()
    write_manifest(run / "manifest.json", whole)
    page_of(tmp_path / "a.html", run)
    text = Page((tmp_path / "a.html").read_text()).text.replace("\u00d7", "x")
    assert question in text
    assert ("two" in text.split("What is promised")[0]) == (threat.get("patches") == 2)
    assert ("two rectangles" in text) == (threat.get("patches") == 2)


def test_an_incomplete_run_says_so(tmp_path: Path):
    page_of(tmp_path / "a.html", certification(tmp_path / "run", images=20, images_of=50))
    assert "Not complete: 20 of 50 images have a record." in Page((tmp_path / "a.html").read_text()).text


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inside for path in paths_of(part, (*at, key)))]


def test_a_forged_manifest_gives_a_page_or_one_line(tmp_path: Path):
    """Every entry in turn is replaced by something else, with the hash mended."""
    run = certification(tmp_path / "run", images=5, k=2, strategy="vanilla", epochs=1)
    whole = json.loads((run / "manifest.json").read_text())
    tried = Counter()
    for path in paths_of({key: value for key, value in whole.items() if key != "sha256"})[1:]:
        if "windows" in path and len(path) > 4:  # enough of them
            continue
        for other in (None, -1.5, ["<b>"]):
            forged = json.loads(json.dumps(whole))
            place = forged
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = other
            write_manifest(run / "manifest.json", forged)
            try:
                page_of(tmp_path / "a.html", run)
                tried["written"] += 1
            except CertiPatchError:
                tried["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{path} = {other!r}") from error
    assert min(tried["written"], tried["refused"]) > 50, tried
