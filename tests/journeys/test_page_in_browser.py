"""The report page in Debian's chromium, headless.

It asks the network for nothing, obeys nothing that it shows, and can be used, by keyboard too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest

from certipatch.records.read import read_folder, read_records
from certipatch.report.certification import summarize
from certipatch.report.compared import compare
from certipatch.report.images import address as address_of
from certipatch.report.page.html import write_page
from certipatch.report.places import ByPlace
from invented import HOSTILE, certification

CELL = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Debian's chromium (apt-get install chromium), or CHROMIUM=path"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of three runs with hostile names, with pictures."""
    folder = tmp_path_factory.mktemp("page")
    runs = [
        certification(folder / "a", k=3),
        certification(folder / "b", k=2),
        certification(folder / HOSTILE[1].replace("/", ""), patch=7),
        certification(folder / "p", places=True, seed=3),
    ]
    grey = address_of(np.full((32, 32, 3), 90, dtype=np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("certipatch.report.page.gallery.images_of", lambda *_: None)
        patch.setattr(
            "certipatch.report.page.gallery.pictures",
            lambda _, records: {r.pixels: grey for r in records if r.pixels},
        )
        assert write_page(folder / "page.html", compare([read_folder(run) for run in runs])) == []
    return (folder / "page.html").as_uri()


@pytest.fixture
def tab(browser: playwright.Browser, address: str) -> Iterator[playwright.Page]:
    """The open page. When the test is over it must have asked for itself alone, and complained of nothing."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(address)
    yield page
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert complaints == []
    assert page.evaluate("window.hacked") is None
    page.close()


def records_of(address: str, name: str) -> list:
    return read_records(Path(unquote(urlparse(address).path)).parent / name)


def test_hostile_names_stay_text(tab):
    assert tab.locator("#classes th", has_text=HOSTILE[0]).count() == 1
    assert tab.locator("#classes th", has_text="<img src=x").count() == 1
    assert tab.locator("img[src=x], iframe, #classes script").count() == 0
    assert "hacked" in tab.locator("#run option").nth(2).inner_text()


def test_runs_are_looked_into(tab, address):
    failing = [
        sum(r.failing_pair is not None and r.vanilla_label == r.label for r in records_of(address, name))
        for name in "ab"
    ]
    assert tab.inner_text("#failing").startswith(f"{failing[0]} of 60")
    assert tab.inner_text("#h-where").endswith(": a")
    tab.select_option("#run", "1")
    assert tab.inner_text("#failing").startswith(f"{failing[1]} of 60")
    assert tab.inner_text("#h-where").endswith(": b")
    assert tab.locator("#pairs li").count() > 1


def test_hovering_shows_the_masked_image(tab, address):
    tab.locator("#pairs button").nth(1).hover()
    label = tab.locator("#pairs button").nth(1).get_attribute("aria-label")
    assert tab.inner_text("#masked-what").startswith(label.split(":")[0])
    assert tab.locator("#masked i").count() == (2 if "," in label.split(":")[0] else 1)
    assert tab.locator("#masked img").count() == 1
    tab.locator("#heat .cell").nth(4).hover()
    assert tab.locator("#pairs button[aria-pressed=true]").count() == 1
    assert "under the failing masks of" in tab.locator("#heat .cell title").first.text_content()


def test_the_map_of_proven_places(tab, address):
    """Green lies where a mask with a proven row hides the patch, and nowhere else, on cards and in the
    viewer; a run without places says so."""
    assert "not certified by place" in tab.inner_text("#places-what")
    assert tab.is_hidden("#places-maps")
    tab.select_option("#run", "3")
    folder = read_folder(Path(unquote(urlparse(address).path)).parent / "p")
    shares = ByPlace.of(folder, min_margin=summarize(folder).min_margin).shares()
    told = tab.inner_text("#places-what")
    assert told.startswith(f"{(shares == 1).sum()} of 60 images are proven at every place")
    assert tab.get_attribute("#places-mean svg", "aria-label").startswith("map of the share of images")
    cards = tab.locator("#places-cards button")
    assert cards.count() == 12
    tab.evaluate("window.scrollTo(0, document.getElementById('places').offsetTop)")
    for card in (cards.first, cards.last):
        share = float(card.inner_text().splitlines()[-1].split(" %")[0].lstrip("<>"))
        assert covered(card.locator("svg"), ".proven") == pytest.approx(share / 100, abs=0.001)
        assert covered(card.locator("svg"), ".unproven") == pytest.approx(1 - share / 100, abs=0.001)
    cards.first.focus()
    tab.keyboard.press("Enter")
    assert tab.is_checked("#viewer-map")
    assert tab.locator("#viewer-plane svg .proven, #viewer-plane svg .unproven").count() >= 1
    tab.uncheck("#viewer-map")
    assert tab.locator("#viewer-plane svg .unproven").count() == 0


def covered(drawing, which: str) -> float:
    """The share of the places of a 5x5 patch in 32x32 pixels that the rectangles of a map cover."""
    paths = drawing.locator(which).all()
    drawn = [tuple(map(float, cell)) for path in paths for cell in CELL.findall(path.get_attribute("d"))]
    return sum(h * w for _, _, h, w in drawn) / 28**2


def test_images_are_filtered_and_paged(tab, address):
    records = records_of(address, "a")
    assert "1\u201325 of 60" in tab.inner_text("#count")
    tab.click("#on")
    assert "26\u201350 of 60" in tab.inner_text("#count")
    tab.select_option("#outcome", "0")
    certified = sum(record.certified for record in records)
    assert f"of {certified} images" in tab.inner_text("#count")
    assert set(tab.locator("#rows .state").all_inner_texts()) == {"✓ certified"}
    tab.select_option("#class", "3")
    both = sum(record.certified and record.label == 3 for record in records)
    assert f"of {both} images" in tab.inner_text("#count")
    tab.fill("#text", "no such image")
    assert tab.inner_text("#count") == "no image matches"


def test_masks_are_stepped_through_by_keyboard(tab, address):
    card = tab.locator("#gallery .missed .card").first
    card.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#viewer").evaluate("dialog => dialog.open")
    assert "✗" in tab.inner_text("#viewer-what")
    assert tab.locator("#viewer-plane i").count() == 2
    tab.click("#to-none")
    assert tab.locator("#viewer-plane i").count() == 0
    assert tab.inner_text("#viewer-what").startswith("Without a mask")
    tab.locator("#first").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#viewer-plane i").count() == 1
    assert "✓" in tab.inner_text("#viewer-what"), "just missed: right under every single mask"
    tab.keyboard.press("Escape")
    assert not tab.locator("#viewer").evaluate("dialog => dialog.open")


def test_stepping_visits_every_pair_once(tab):
    """As many views as Algorithm 2 asks for, and the clean one."""
    tab.locator("#gallery .certified .card").first.click()
    tab.click("#to-none")
    seen = []
    for button, n in (("#step", 46), ("#step-back", 46)):
        visited = []
        for _ in range(n):
            tab.click(button)
            visited.append((tab.input_value("#first"), tab.input_value("#second")))
        assert visited[-1] == ("0", "0")
        seen.append(visited)
    assert len(set(seen[0])) == 46
    assert seen[1] == [*seen[0][-2::-1], ("0", "0")]


def test_choosing_a_pair_opens_its_images(tab):
    button = tab.locator("#pairs button").first
    button.click()
    assert button.get_attribute("aria-label").split(":")[0] in tab.inner_text("#viewer-facts")
    assert "✗" in tab.inner_text("#viewer-what")


def test_from_image_to_image(tab):
    tab.locator("#gallery .certified .card").first.click()
    first = tab.inner_text("#viewer-facts")
    tab.click("#image-on")
    assert tab.inner_text("#viewer-facts") != first
    tab.click("#image-back")
    assert tab.inner_text("#viewer-facts") == first
    assert tab.locator("#image-back").is_disabled()
    tab.click("#viewer .close")
    assert not tab.locator("#viewer").evaluate("dialog => dialog.open")


READ = [
    *("h1", ".kicker", ".answer strong", ".warning", ".fraction", ".what", "thead th", ".state.certified"),
    *(".state.missed", ".state.hopeless", "#failing", ".card .text", "code"),
]
# For the first element of each selector: what it is, and the contrast of its text with what is behind it.
CONTRASTS = r"""
(selectors) => {
  const linear = (x) => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\d.]+/g).map(Number).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (!/, 0\)$|transparent/.test(colour)) return colour;
    }
    return "rgb(255,255,255)";
  };
  return selectors.flatMap((name) => [...document.querySelectorAll(name)].slice(0, 1)).map((element) => {
    const both = [light(getComputedStyle(element).color), light(behind(element))];
    const [more, less] = both.sort((x, y) => y - x);
    return [element.className || element.tagName, (more + 0.05) / (less + 0.05)];
  });
}
"""


@pytest.mark.parametrize(
    ("width", "scheme"), [(390, "light"), (390, "dark"), (1200, "dark"), (1200, "light")]
)
def test_fits_the_window_and_can_be_read(tab, width: int, scheme: str):
    """No sideways scrolling, and text that stands out from its background (WCAG AA: 4.5 to 1)."""
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = tab.evaluate(CONTRASTS, READ)
    assert len(contrasts) >= 10
    assert [entry for entry in contrasts if entry[1] < 4.5] == []


def test_prints(tab):
    tab.emulate_media(media="print")
    assert not tab.locator("#filters").is_visible()
    assert tab.locator("h1").is_visible()
    assert len(tab.pdf(format="A4")) > 10_000
