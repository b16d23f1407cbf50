"""The report page: its numbers are those of the records, it is complete in itself, and nothing in it is
obeyed. In a browser: test_page_in_browser.py."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from certipatch.geometry.masks import MaskSet
from certipatch.records.manifest import manifest
from certipatch.records.read import read_records
from certipatch.records.schema import RECORDS, Record
from certipatch.records.store import Store
from certipatch.report.certification import summarize
from certipatch.report.curves import against_k, against_patch
from certipatch.report.findings import failing_pairs, heat, of_classes, outcome, telling
from certipatch.report.page.html import write_page

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "a\"b'c&amp;\n\u202e\x1b[31m{{ 7*7 }}",
    "plain",
)


def certification(
    folder: Path,
    *,
    images: int = 60,
    patch: int = 5,
    k: int = 3,
    classes: tuple[str, ...] = HOSTILE,
    seed: int = 0,
    weights: str = "ab" * 32,
    images_of: int | None = None,
    **trained: Any,
) -> Path:
    """A folder as ``certify`` writes it, with invented answers of every kind."""
    rng = random.Random(seed)
    masks = MaskSet.covering(image_size=(32, 32), patch_size=(patch, patch), masks_per_axis=k)
    experiment = {
        "model": {"arch": "small-cnn", "classes": list(classes)},
        "weights_sha256": weights,
        "trained": trained or None,
        "masks": masks.to_json(),
        "fill": [0.5, 0.5, 0.5],
        "data": {
            "images": images_of or images,
            "fingerprint": f"{images}",
            "classes": list(classes),
            "sample": "00",
        },
        "device": "cpu",
        "precision": "32-true",
        "exhaustive": False,
        "block": 32,
    }
    with Store(folder, {**manifest("certify", experiment), "data": f"photos/{HOSTILE[0]}"}, RECORDS) as store:
        store.append(
            invented(index, len(masks), classes, rng).model_dump(mode="json") for index in range(images)
        )
        store.finish()
    return folder


def invented(index: int, masks: int, classes: tuple[str, ...], rng: random.Random) -> Record:
    label = rng.randrange(len(classes))
    other = (label + 1 + rng.randrange(len(classes) - 1)) % len(classes)
    kind = rng.choice(["certified", "certified", "pair", "mask", "vanilla", "unreadable"])
    common = {
        "index": index,
        "name": f"{classes[label]}-{index}",
        "label": label,
        "pixels": "00" * 32,
        "margin": rng.random(),
        "passes": rng.randint(10, 46),
    }
    if kind == "unreadable":
        return Record(**common | {"pixels": None, "margin": None, "passes": 0}, vanilla_label=None, defended_label=None, case=None, certified=False,
                      failing_pair=None, failing_label=None, error=HOSTILE[1])  # fmt: skip
    pair = tuple(sorted(rng.sample(range(masks), 2)))
    wrong = {"failing_pair": (pair[0],) * 2 if kind in ("mask", "vanilla") else pair, "failing_label": other}
    return Record(
        **common,
        vanilla_label=other if kind == "vanilla" else label,
        defended_label=label,
        case="agreed" if kind in ("certified", "pair") else "majority",
        certified=kind == "certified",
        **({"failing_pair": None, "failing_label": None} if kind == "certified" else wrong),
    )


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
    notes = write_page(out, [summarize(folder)])
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
    """A page that stays small: a bounded number of elements and pictures, and about a hundred bytes an
    image."""
    many = tuple(f"class {n}" for n in range(1000))
    write_page(tmp_path / "a.html", [summarize(certification(tmp_path / "run", images=10_000, classes=many))])
    text = (tmp_path / "a.html").read_text()
    assert len(text) < 200 * 10_000
    assert len(Page(text).elements) < 500


# --- Findings, against naive restatements
# ----------------------------------------------------------------------------


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
    summaries = [summarize(run) for run in [*runs, other, another]]
    chart = against_patch(summaries)
    assert [(curve.name, [point.label for point in curve.points]) for curve in chart.curves] == [
        ("small-cnn, k=2", ["3x3", "5x5", "7x7"]),
        ("small-cnn, k=3", ["3x3", "5x5", "7x7"]),
    ]
    for curve, k in zip(chart.curves, (2, 3), strict=True):
        assert [point.share for point in curve.points] == [
            summarize(tmp_path / f"{patch}-{k}").certified_robust_accuracy for patch in (3, 5, 7)
        ]
    assert len(against_k(summaries).curves) == 3
    assert against_patch(summaries[:2]) is None
    assert against_k(summaries[:1]) is None


# --- On the command line
# ---------------------------------------------------------------------------------------------


def test_pictures_are_those_that_were_certified(cli, trained: Path, photos: Path, tmp_path: Path):
    given = ["--model", trained, "--data", photos, "--patch", 8, "--masks-per-axis", "2,3", "--limit", 12]
    assert cli("certify", *given, "--out", tmp_path / "c").code == 0
    attack = [
        "attack",
        "--model",
        trained,
        "--data",
        photos,
        "--records",
        tmp_path / "c" / "8x8-k3",
        "--steps",
        2,
        "--restarts",
        2,
    ]
    assert cli(*attack, "--out", tmp_path / "a").code == 0
    done = cli("report", tmp_path / "c", tmp_path / "a", "--html", tmp_path / "page.html")
    assert (done.code, done.err) == (0, ""), done.err
    assert f"page: {tmp_path / 'page.html'}" in done.out.replace("\n", "")
    page = Page((tmp_path / "page.html").read_text())
    data = json.loads(page.inside["script"][0])
    records = {record.pixels for record in read_records(tmp_path / "c" / "8x8-k3")}
    assert set(data["pictures"]) <= records
    assert len(data["pictures"]) >= 6
    for name, address in data["pictures"].items():
        assert hashlib.sha256(_pixels(address).tobytes()).hexdigest() == name
    assert all(set(run["picture"].values()) <= set(data["pictures"]) for run in data["runs"])
    assert "0 of" in page.text
    assert "certified images were broken" in page.text


def _pixels(address: str) -> np.ndarray:
    """(3, H, W) of a ``data:`` address."""
    import io

    from PIL import Image

    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", address).groups()
    assert kind == "png"
    return np.ascontiguousarray(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).transpose(2, 0, 1))


def test_bad_input_is_one_line(cli, trained: Path, photos: Path, tmp_path: Path, folder: Path):
    from inputs import write_photos

    certified = tmp_path / "c"
    assert (
        cli(
            "certify",
            "--model",
            trained,
            "--data",
            photos,
            "--patch",
            8,
            "--masks-per-axis",
            2,
            "--limit",
            6,
            "--out",
            certified,
        ).code
        == 0
    )
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
    """And about no more: not two patches where it was one."""
    from inputs import write_manifest

    run = certification(tmp_path / "run", images=3)
    whole = json.loads((run / "manifest.json").read_text())
    whole["experiment"]["masks"] = MaskSet.covering(
        image_size=(size, size), masks_per_axis=3, **threat
    ).to_json()
    write_manifest(run / "manifest.json", whole)
    write_page(tmp_path / "a.html", [summarize(run)])
    text = Page((tmp_path / "a.html").read_text()).text.replace("\u00d7", "x")
    assert question in text
    assert ("two" in text.split("What is promised")[0]) == (threat.get("patches") == 2)
    assert ("two rectangles" in text) == (threat.get("patches") == 2)


def test_an_incomplete_run_says_so(tmp_path: Path):
    write_page(tmp_path / "a.html", [summarize(certification(tmp_path / "run", images=20, images_of=50))])
    assert "Not complete: 20 of 50 images have a record." in Page((tmp_path / "a.html").read_text()).text


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inside for path in paths_of(part, (*at, key)))]


def test_a_forged_manifest_gives_a_page_or_one_line(tmp_path: Path):
    """Every entry in turn replaced by something else, with the hash mended."""
    from certipatch.errors import CertiPatchError
    from inputs import write_manifest

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
                write_page(tmp_path / "a.html", [summarize(run)])
                tried["written"] += 1
            except CertiPatchError:
                tried["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{path} = {other!r}") from error
    assert min(tried["written"], tried["refused"]) > 50, tried
