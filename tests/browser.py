"""A browser for the tests of pages: an installed Chromium, never one that Playwright fetches."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def chromium() -> str:
    """Where it is. Without one the test is skipped; in CI (the variable is set) it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium, which CI must have: install the package chromium", pytrace=False)
    return found or pytest.skip("needs Chromium")


@contextmanager
def opened(profile: Path, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """A page of Playwright's in a fresh Chromium, whose profile lies in the empty directory `profile`."""
    executable = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=executable,
            args=list(FLAGS),
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
        )
        try:
            yield context.pages[0] if context.pages else context.new_page()
        finally:
            context.close()
