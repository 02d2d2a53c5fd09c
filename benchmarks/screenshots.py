"""Pictures of pages for README.md and docs/, small ones, by the system's Chromium.

    python benchmarks/screenshots.py report outputs/demo        # docs/report.webp: the report of a finished run
    python benchmarks/screenshots.py play outputs/demo          # docs/play.webp: `pdistill play` of it

It needs Chromium and `pip install 'pdistill[dev]'`.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from pdistill.commands import play as command
from pdistill.errors import UserError
from pdistill.report import page as report_page

DOCS = Path(__file__).parents[1] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
SCREENS = (("light", 1280, 800), ("dark", 390, 800))  # theme, width, height
GAP = 16
SECONDS = 120  # until a page has drawn


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Raises UserError where there is none."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise UserError("this needs a browser: install the package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


def report(run: Path) -> list[bytes]:
    """The first screen of a run's page: wide and light, and narrow and dark."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        file = Path(folder) / "report.html"
        report_page.write([run], file)
        found = []
        for theme, width, height in SCREENS:
            shown = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)  # type: ignore[arg-type]
            shown.goto(f"file://{file}")
            found.append(shown.screenshot())
    return found


def play(run: Path) -> list[bytes]:
    """The pictures of a run in the light theme, and every step in the dark one."""
    port = command.free_port(command.LOCAL, None)
    settings = Namespace(host=command.LOCAL, port=port, device="cpu", open=False)
    served = command.launched(settings, run, command.notes_of(run))
    try:
        with chromium() as browser:
            page, found = browser.new_page(viewport={"width": 1280, "height": 900}), []
            for theme, view in (("light", "pictures"), ("dark", "every step")):
                page.goto(f"{served.local_url}?__theme={theme}")
                page.locator("#status", has_text="of seed 0").wait_for(timeout=1000 * SECONDS)
                page.get_by_text(view, exact=True).click()
                page.get_by_role("button", name="Draw").click()  # again, so that nothing is timed for the first time
                page.wait_for_timeout(3000)
                page.locator("#status", has_text="of seed 0").wait_for(timeout=1000 * SECONDS)
                found.append(page.screenshot(full_page=True))
    finally:
        served.close(verbose=False)
    return found


def on_one_sheet(screenshots: list[bytes], below: bool, file: Path) -> None:
    """Screenshots beside each other, or one `below` the other, as a small WebP file."""
    pictures = [Image.open(io.BytesIO(content)).convert("RGB") for content in screenshots]
    across, along = (lambda p: p.width, lambda p: p.height) if below else (lambda p: p.height, lambda p: p.width)
    most, sum_of_all = max(map(across, pictures)), sum(map(along, pictures)) + GAP * (len(pictures) - 1)
    sheet, at = Image.new("RGB", (most, sum_of_all) if below else (sum_of_all, most), "#888"), 0
    for picture in pictures:
        sheet.paste(picture, (0, at) if below else (at, 0))
        at += along(picture) + GAP
    sheet.save(file, quality=80, method=6)
    print(f"wrote {file} ({file.stat().st_size / 1000:.0f} kB)")


PAGES = {"report": report, "play": play}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=PAGES)
    parser.add_argument("run", type=Path, help="a finished run, outputs/<name>")
    options = parser.parse_args(arguments)
    try:
        on_one_sheet(PAGES[options.page](options.run), options.page == "play", DOCS / f"{options.page}.webp")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
