"""The page of ``certipatch serve`` in Debian's chromium: a photograph is dropped, answer and proof are read.

It asks the service alone, complains of nothing, and can be used by keyboard and on a phone.
``SCREENSHOTS=folder`` keeps pictures of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from certipatch.certification.certify import certify
from certipatch.data.load import load_source
from certipatch.geometry.masks import MaskSet
from certipatch.models.runs import open_run
from certipatch.records.read import read_records
from certipatch.runtime.devices import make_fabric

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Debian's chromium (apt-get install chromium), or CHROMIUM=path"
)


@pytest.fixture(scope="module")
def certified(trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    masks = MaskSet.covering(image_size=(32, 32), patch_size=(16, 16), masks_per_axis=3)
    out, fabric = tmp_path_factory.mktemp("serve") / "c", make_fabric(device="cpu")
    certify(open_run(trained), load_source(str(photos)), masks, out, fabric=fabric, data="photos", prove=True)
    return out


@pytest.fixture(scope="module")
def address(trained: Path, certified: Path) -> Iterator[str]:
    command = ["serve", "--model", str(trained), "--certified", str(certified), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "certipatch", *command], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(20)
    process.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=["wide", "phone", "dark"])
def tab(request, browser: playwright.Browser, address: str) -> Iterator[playwright.Page]:
    width = 390 if request.param == "phone" else 1100
    scheme = "dark" if request.param == "dark" else "light"
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    page.wait_for_function("document.querySelectorAll('#facts dt').length > 5")
    while page.evaluate("fetch('health').then(answer => answer.status)") == 503:
        complaints.clear()  # a browser's own line about the status
    yield page
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/service-{request.param}.png", full_page=True)
    assert [url for url in asked if not url.startswith(("data:", address))] == []
    assert complaints == []
    page.close()


def test_a_photograph_is_dropped(tab, photos: Path, certified: Path):
    records = read_records(certified)
    for proven in (True, False):
        record = next(r for r in records if r.unchangeable is proven)
        tab.set_input_files("#file", photos / record.name)
        tab.wait_for_function(
            "want => document.getElementById('proof').className === want", arg="yes" if proven else "no"
        )
        name = ("blue", "green", "red")[record.defended_label]
        assert tab.inner_text("#answer b") == name
        assert tab.locator("#grid button").count() == 9
        said = tab.inner_text("#statement")
        assert said.startswith("Proven: whatever one patch" if proven else "Not proven")
        assert tab.locator("#show").is_visible() != proven
        assert tab.get_attribute("#seen", "src").startswith("data:image/png")
        assert tab.locator("#over rect.patch").count() == 1
    tab.click("#where")
    share = float(tab.inner_text("#caption").split("proven there: ")[1].split(" %")[0]) / 100
    drawn = tab.evaluate(
        """() => { const map = document.getElementById("map"), pen = map.getContext("2d");
        const dots = pen.getImageData(0, 0, map.width, map.height).data; let blue = 0;
        for (let i = 0; i < dots.length; i += 4) blue += dots[i + 3] > 0 && dots[i + 2] > dots[i];
        return blue; }"""
    )
    assert share == pytest.approx(drawn / 17**2, abs=6e-4)  # 16x16 in 32x32: 17 places an axis
    tab.click("#show")
    assert tab.locator("#map").is_hidden()
    assert 1 <= tab.locator("#over rect.mask").count() <= 2
    assert "With these parts hidden" in tab.inner_text("#caption")
    tab.locator("#grid button").nth(4).focus()
    assert tab.inner_text("#caption").startswith("Under mask 5 of 9 the model says ")
    tab.keyboard.press("Tab")
    assert tab.inner_text("#caption").startswith("Under mask 6 of 9")
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_what_is_no_image_is_said(browser, address: str):
    page = browser.new_page()
    page.goto(address)
    page.wait_for_function("document.querySelectorAll('#facts dt').length > 5")
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no image"})
    page.wait_for_selector("#error:not([hidden])")
    assert "not an image of a known format" in page.inner_text("#error")
    page.close()
