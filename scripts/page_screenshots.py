"""Pictures of a report page as a browser shows it: wide, on a phone, dark, and one image with its masks.

    certipatch demo --out demo-out
    python scripts/page_screenshots.py demo-out/report.html docs

Needs Debian's chromium (or CHROMIUM=path) and the package playwright. Writes report-wide.png,
report-phone.png, report-dark.png and report-masks.png, with few colours to keep them small.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SHOTS = {
    "wide": (1200, 1500, "light"),
    "phone": (390, 1500, "light"),
    "dark": (1200, 1500, "dark"),
    "masks": (1000, 720, "light"),
}


def main(page: Path, out: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"),
            args=["--no-sandbox", "--font-render-hinting=none"],
        )
        for name, (width, height, scheme) in SHOTS.items():
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab.goto(page.resolve().as_uri())
            if name == "masks":
                tab.locator("#gallery .missed .card").first.click()
            data = tab.screenshot(full_page=name in sys.argv[3:])
            image = (
                Image.open(io.BytesIO(data)).convert("RGB").quantize(255, method=Image.Quantize.FASTOCTREE)
            )
            image.save(out / f"report-{name}.png", optimize=True)
            tab.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
