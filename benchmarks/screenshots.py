"""Pictures of pages for README.md and docs/, small ones.

    python benchmarks/screenshots.py report outputs/demo        # docs/report.webp: the report of a finished run

It needs Chromium and `pip install 'pdistill[dev]'`.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from pdistill.errors import UserError
from pdistill.report import page

DOCS = Path(__file__).parents[1] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
SCREENS = (("light", 1280, 800), ("dark", 390, 800))  # theme, width, height


def report(run: Path) -> Path:
    """The first screen of a run's page: wide and light, and beside it narrow and dark."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        page.write([run], file)
        return beside_each_other(screens(f"file://{file}", Path(folder)), DOCS / "report.webp")


def screens(address: str, folder: Path) -> list[Image.Image]:
    """What a browser shows of a page at each of the sizes. Raises UserError where there is no browser."""
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise UserError("this needs a browser: install the package chromium")
    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        for theme, width, height in SCREENS:
            shown = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
            shown.goto(address)
            shown.screenshot(path=folder / f"{theme}-{width}.png")
            found.append(Image.open(folder / f"{theme}-{width}.png").convert("RGB"))
        browser.close()
    return found


def beside_each_other(pictures: list[Image.Image], file: Path, gap: int = 16) -> Path:
    """The pictures in a row, as a small WebP file."""
    size = (sum(p.width for p in pictures) + gap * (len(pictures) - 1), max(p.height for p in pictures))
    sheet, left = Image.new("RGB", size, "#888"), 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    sheet.save(file, quality=80, method=6)
    return file


PAGES = {"report": report}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=PAGES)
    parser.add_argument("run", type=Path, help="a finished run, outputs/<name>")
    options = parser.parse_args(arguments)
    try:
        print(f"wrote {PAGES[options.page](options.run)}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
