"""How large a report page of many images is, and how long a browser takes to open it.

    python benchmarks/open_page.py --images 10000

Invented records of a thousand classes, without pictures (they are limited to a few megabytes whatever the
number of images), in Debian's chromium. Median of five; "open" is from the start of navigation to the end of
the load event, with the script in it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from certipatch.records.read import read_folder
from certipatch.report.compared import compare
from certipatch.report.page.html import write_page

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from invented import certification


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        run = certification(
            Path(place) / "run", images=images, k=6, classes=tuple(f"class {n}" for n in range(1000))
        )
        page = Path(place) / "page.html"
        write_page(page, compare([read_folder(run)]))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        opened, filtered = [], []
        for _ in range(5):
            tab = browser.new_page()
            tab.goto(page.as_uri())
            opened.append(tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
            filtered.append(
                tab.evaluate(
                    "{ const start = performance.now(); by('text').value = '77'; filter(); "
                    "performance.now() - start }"
                )
            )
            elements = tab.evaluate("document.getElementsByTagName('*').length")
            tab.close()
        browser.close()
        size = page.stat().st_size / 2**20
    print(
        f"{images} images: {size:.2f} MiB, {elements} elements; opened in {statistics.median(opened):.0f} ms "
        f"({min(opened):.0f}-{max(opened):.0f}), searched in {statistics.median(filtered):.0f} ms"
    )


if __name__ == "__main__":
    main()
