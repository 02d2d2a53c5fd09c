"""The documentation site: built once as `make docs` does, warnings being errors; its links, llms.txt, a browser."""

import os
import re
import subprocess
import sys
import threading
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import chromium, started

ROOT = Path(__file__).parent.parent
FOREIGN = re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^)"']+""")  # in a style sheet
LOADED = {"img": "src", "script": "src", "iframe": "src", "link": "href", "source": "src"}


class Parsed(HTMLParser):
    """Of a page: what links may lead to, where its own lead, and what it loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(LOADED.get(tag, "")):
            self.loads.append(given[LOADED[tag]])


parsed = cache(Parsed)


def build(directory: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory), *options]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="session")
def site(workplace, once) -> Path:
    """What `make docs` makes."""

    def make() -> None:
        done = build(workplace / "site")
        assert done.returncode == 0, done.stdout + done.stderr

    return once(workplace / "site", make)


def test_every_link_leads_somewhere(site):
    wrong, seen = [], 0
    for page in site.rglob("*.html"):
        for link in [*parsed(page).links, *parsed(page).loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                well_formed = parts.scheme in ("https", "mailto") and (parts.netloc or parts.scheme == "mailto")
                wrong += [] if well_formed and " " not in link else [f"{page.name}: {link} is no address"]
                continue
            seen += 1
            place = site / parts.path.lstrip("/") if parts.path.startswith("/") else page.parent / parts.path
            target = (page if not parts.path else place / "index.html" if place.is_dir() else place).resolve()
            if not Path(unquote(str(target))).exists():
                wrong.append(f"{page.name}: {link} leads nowhere")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in parsed(target).anchors:
                wrong.append(f"{page.name}: {link} has no such anchor")
    assert not wrong and seen > 500


def test_nothing_is_loaded_from_elsewhere(site):
    foreign = [f"{page.name}: {load}" for page in site.rglob("*.html") for load in parsed(page).loads if ":" in load]
    foreign += [f"{file.name}: {load}" for file in site.rglob("*.css") for load in FOREIGN.findall(file.read_text())]
    assert [load for load in foreign if "data:" not in load] == []


def test_llms_txt_lists_every_page(site):
    lines = (site / "llms.txt").read_text().splitlines()
    assert lines[0] == "# pdistill" and lines[2].startswith("> ")
    listed = [line.removeprefix("- [").partition("](") for line in lines if line.startswith("- [")]
    places = [rest.partition("): ") for _, _, rest in listed]
    assert all((site / place).is_file() and about for place, _, about in places)
    assert {Path(place).stem for place, _, _ in places} == {page.stem for page in site.glob("*.html")} - {"404"}


def test_the_notebook_and_the_keys_are_pages(site):
    notebook, keys = ((site / name).read_text() for name in ("quickstart.md", "keys.md"))
    assert "pdistill.DistillationModule(" in notebook and "fid_classifier" in notebook
    assert (site / "quickstart-1.png").stat().st_size > 1000
    assert "distillation.max_teacher_steps=2  (int)" in keys
    assert 'id="pdistill.training.fit.FitSettings.updates"' in (site / "api.html").read_text()


def test_a_dead_link_ends_the_build(tmp_path):
    """The settings that make it so, on a page of one's own: the whole site would take as long again."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[one](#missing) [two](none.md)\n")
    changed = "hooks: []\nplugins: []\nextra_css: []\ntheme: {name: mkdocs, favicon: null}\n"
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nwatch: []\n{changed}")
    done = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Aborted with 2 warnings" in said and "'#missing'" in said and "'none.md'" in said


@pytest.fixture
def served(site):
    """The address of the site, where a server of this process has it: a search needs one."""
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def test_the_site_in_a_browser(served):
    """Nothing fails, nothing is asked of another host, a phone scrolls no page sideways, and the search finds."""
    with started() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 900})
        faults, asked = [], []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        for name in ("index", "methods", "api"):
            page.goto(f"{served}/{name}.html")
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 390, f"{name}.html is {width} pixels wide"
        assert page.locator("h1").first.inner_text().startswith("Python API")
        page.set_viewport_size({"width": 1280, "height": 900})
        page.locator("input[name=query]").click()
        page.locator("input[name=query]").press_sequentially("parallel decoding")
        typed = page.locator(".md-search-result__item a[href*='+decoding']").first  # not what was found for "p"
        typed.wait_for(timeout=20_000)
        found = typed.get_attribute("href")
        assert "methods.html" in found and not faults
        assert len(asked) > 10 and all(url.startswith((served, "data:", "blob:")) for url in asked)


def test_in_ci_a_missing_browser_is_a_failure(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs Chromium"):
        chromium()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium, which CI must have"):
        chromium()
