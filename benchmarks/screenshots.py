"""Pictures of pages for the documentation, by Debian's Chromium: `python benchmarks/screenshots.py play RUN`.

`play` writes docs/play.webp, `pdistill play RUN` with pictures and trajectories side by side. It needs Playwright's
Python package, and the Chromium of the system.
"""

import argparse
import contextlib
import io
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent.parent / "docs"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
WIDTH, HEIGHT = 1280, 900
QUALITY = 80  # of WebP


@contextlib.contextmanager
def browser_page(width: int = WIDTH, height: int = HEIGHT):
    """A page of Chromium. Exits where there is none."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium: install the package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser.new_page(viewport={"width": width, "height": height})
        browser.close()


def save(screenshots: list[bytes], file: Path) -> None:
    """Screenshots one below the other, as a small WebP."""
    pictures = [Image.open(io.BytesIO(content)).convert("RGB") for content in screenshots]
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    whole.save(file, "WEBP", quality=QUALITY, method=6)
    print(f"wrote {file} ({file.stat().st_size / 1000:.0f} kB)")


@contextlib.contextmanager
def _play(run: Path) -> Iterator[str]:
    """The address of `pdistill play`."""
    from pdistill.commands import play

    settings = Namespace(host=play.LOCAL, port=play.free_port(play.LOCAL, None), device="cpu", open=False)
    served = play.launched(settings, run, play.notes_of(run))
    try:
        yield served.local_url
    finally:
        served.close(verbose=False)


def play(run: Path, file: Path) -> None:
    """docs/play.webp: the pictures of a run in the light theme, and every step in the dark one."""
    with _play(run) as address, browser_page() as page:
        shown = []
        for theme, view in (("light", "pictures"), ("dark", "every step")):
            page.goto(f"{address}?__theme={theme}")
            page.locator("#status", has_text="of seed 0").wait_for(timeout=120_000)
            page.get_by_text(view, exact=True).click()
            page.get_by_role("button", name="Draw").click()  # again, so that nothing is timed for the first time
            page.wait_for_timeout(3000)
            page.locator("#status", has_text="of seed 0").wait_for(timeout=120_000)
            shown.append(page.screenshot(full_page=True))
        save(shown, file)


PAGES = {"play": play}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", choices=PAGES)
    parser.add_argument("run", type=Path, help="a finished run, e.g. outputs/demo")
    parser.add_argument("--output", type=Path, help="by default docs/<page>.webp")
    settings = parser.parse_args()
    PAGES[settings.page](settings.run, settings.output or DOCS / f"{settings.page}.webp")


if __name__ == "__main__":
    main()
