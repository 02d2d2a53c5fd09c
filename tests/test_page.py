"""report.html in a browser: what is seen first, what answers to clicks, who can read it, and on how much paper."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import started
from finished_runs import make_run
from playwright.sync_api import Browser, Page

from pdistill.report import charts, headline, page, rounding, tables

NARROW, WIDE = {"width": 390, "height": 800}, {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all tests here."""
    with started() as browser:
        yield browser


@pytest.fixture(scope="module")
def finished(smoke, tmp_path_factory) -> Path:
    """The page of the finished smoke run."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    page.write([smoke], file)
    return file


@pytest.fixture
def opened(browser):
    """opened(file, viewport=..., ...) -> the page; a mistake in its script fails the test."""
    contexts, mistakes, requests = [], [], []

    def opened(file: Path, **options) -> Page:
        contexts.append(browser.new_context(**options))
        found = contexts[-1].new_page()
        found.on("pageerror", lambda error: mistakes.append(str(error)))
        found.on("request", lambda request: requests.append(request.url))
        found.goto(f"file://{file.resolve()}")
        return found

    yield opened
    for context in contexts:
        context.close()
    assert not mistakes and all(url.startswith(("file:", "data:")) for url in requests)  # it needs no network


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(finished, opened, scheme):
    for viewport in (WIDE, NARROW):
        shown = opened(finished, color_scheme=scheme, viewport=viewport)
        found = Axe().run(shown).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []
        assert shown.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_what_is_seen_first(finished, opened):
    shown = opened(finished, viewport=WIDE)
    said = shown.locator("h1").inner_text()
    assert re.fullmatch(r"A student of 1 step has a fid_classifier of [\d.]+ where .* 8 times fewer .* as fast\.", said)
    for part in ("h1", ".first .strips", ".first .chart svg"):
        box = shown.locator(part).bounding_box()
        assert box and box["y"] + box["height"] <= WIDE["height"], part


def test_it_prints_on_two_pages(finished, opened):
    paper = opened(finished).pdf(format="A4", prefer_css_page_size=True)
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 2


def test_it_answers(finished, opened):
    """The slider, the order of rows, the chart's points and lines."""
    shown = opened(finished, viewport=WIDE)
    assert shown.locator(".grid:visible img").get_attribute("alt") == "Samples, teacher, 8 steps"
    shown.locator("input[type=range]").press("End")
    assert shown.locator(".grid:visible img").get_attribute("alt") == "Samples, 1 step"
    assert shown.locator(".slider output").inner_text() == "1 step"

    stages = shown.get_by_role("region", name="Stages of smoke")
    steps = "rows => rows.map(row => row.cells[1].textContent)"
    stages.get_by_role("button", name="steps").click()
    assert stages.locator("tbody tr").evaluate_all(steps) == ["1", "2", "4", "8"]
    stages.get_by_role("button", name="steps").click()
    assert stages.locator("tbody tr").evaluate_all(steps) == ["8", "4", "2", "1"]

    chart = shown.locator(".first .chart")
    chart.locator("circle").nth(1).hover(force=True)
    assert re.fullmatch(r"students, 2 network evaluations per image: [\d.]+", chart.locator(".tip").inner_text())
    chart.get_by_role("button", name="students").click()
    assert chart.locator(".line:visible").count() == 1


def test_without_scripts_everything_is_there(finished, opened):
    shown = opened(finished, java_script_enabled=False)
    assert shown.locator(".grid img:visible").count() == 4 and not shown.locator("input").is_visible()
    assert shown.locator(".first .chart circle title").first.text_content().startswith("students, ")
    shown.locator(".first .numbers summary").click()
    assert shown.locator(".first .numbers td:visible").count() == 4 * 3


def test_rows_of_several_runs_are_filtered(tmp_path, opened):
    runs, choices = [], []
    for weighting in ("snr", "flow"):
        for seed in range(3):
            values = {"teacher": 2.0 + seed, "steps-0002": 3.0 + seed, "steps-0001": 5.0 + seed}
            runs.append(make_run(f"{weighting}-{seed}", values, root=tmp_path))
            choices.append({"weighting": weighting, "seed": str(seed), "method": "halving"})
    page.write(runs, tmp_path / "report.html", choices)
    shown = opened(tmp_path / "report.html", viewport=WIDE)
    assert shown.locator("h1").inner_text() == (
        "Of 6 students of 1 step, that of snr-0 has the lowest fid_classifier, 5.00; the median is 6.00 and the "
        "highest is 7.00."
    )
    headings = shown.locator("th:visible").all_inner_texts()
    assert headings == ["run", "weighting", "seed", "teacher, 8 steps", "2 steps", "1 step"]
    shown.get_by_label("weighting").select_option("flow")
    shown.get_by_label("seed").select_option("2")
    assert shown.locator("tbody tr:visible td:first-child").all_inner_texts() == ["flow-2"]
    assert shown.locator(".first .line:visible").count() == 1
    assert shown.locator(".filters output").inner_text() == "1 of 6 rows"
    assert Axe().run(shown).response["violations"] == []
    page.write(runs[:3], tmp_path / "seeds.html", choices[:3])
    said = (
        "Over 3 seeds, the student of 1 step has a fid_classifier of 6.0 ± 1.0 where its teacher of 8 steps has 3.0 ±"
    )
    assert said in (tmp_path / "seeds.html").read_text()


def test_a_run_twice_and_two_of_one_name(tmp_path):
    a, b = (make_run("run", {"teacher": 2.0, "steps-0002": 3.0}, root=tmp_path / place) for place in "ab")
    page.write([a, b, a], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<h2>") - text.count("<h2>The ") == 4  # the chart, the table and two runs
    shutil.rmtree(b / "steps-0002")
    page.write([b, b], tmp_path / "page.html")
    assert "A teacher of 8 steps has a fid_classifier of 2.00." in (tmp_path / "page.html").read_text()


def test_a_sentence_says_what_is_known():
    rows = [{"stage": "teacher", "num_steps": 8}, {"stage": "steps-0004", "num_steps": 4}]
    rows += [{"stage": "steps-0003", "num_steps": 3}]
    said = "was distilled from a teacher of 8 steps, and its quality was not measured"
    assert headline.of_run(rows) == f"A student of 3 steps {said}: 2.7 times fewer network evaluations."
    rows[0] |= {"seconds_per_image": 0.1, "seconds_per_image_spread": 0.02, "fid": 2.0}
    rows[1] |= {"seconds_per_image": 0.03, "seconds_per_image_spread": 0.2, "fid": 3.14159}
    assert headline.of_run(rows) == (
        "A student of 4 steps has a fid of 3.14 where its teacher of 8 steps has 2.00: 2 times fewer network "
        "evaluations, 3.3 times as fast."
    )
    rows[0]["provenance"] = {"network_evaluations": 16}  # two a step, of guidance
    assert "4 times fewer" in headline.of_run(rows)
    assert headline.of_run(rows[:1]) == "A teacher of 8 steps has a fid of 2.00."


def test_numbers_have_the_digits_that_their_spread_supports():
    assert [rounding.number(v) for v in (8.594, 13.477, 725.047, 51234.0, 0.01234, 0, None, float("nan"))] == (
        ["8.59", "13.5", "725", "51234", "0.0123", "0", "", ""]
    )
    assert rounding.with_spread(2.8651, 0.7094) == "2.87 ± 0.71"
    assert rounding.with_spread(2.8651, 0.00996) == "2.865 ± 0.010"
    assert rounding.with_spread(725.047, 8.794) == "725.0 ± 8.8" and rounding.with_spread(725.047, 123) == "725 ± 123"
    assert (
        rounding.with_spread(2.8651, None) == "2.87" and rounding.with_spread(1e300, 1e-300) == "1.00e+300 ± 1.0e-300"
    )
    assert rounding.supported(32.8, 2.3) == "33" and rounding.supported(8.24, 0.3) == "8.2"
    assert rounding.mean_and_spread([2.0, 3.0, 4.0]) == "3.0 ± 1.0"


def test_columns_that_are_empty_are_left_out():
    assert tables.filled(["a", "b", "c"], [["1", "", "2"], ["", "", "3"]]) == (["a", "c"], [["1", "2"], ["", "3"]])


def test_points_lie_where_their_values_are():
    nan = float("nan")
    curves = {"a": {1: [4.0], 4: [1.0, 2.0, 3.0], 16: [nan]}, "none": {1: [nan], 2: [-1.0]}}
    chart = charts.quality(curves, "fid", "n")
    assert chart
    (line,) = chart.lines
    (left, low, first, _), (right, high, second, _) = line.points
    assert left < right and low < high and (first, second) == ("a, 1 n: 4.00", "a, 4 n: 2.0 ± 1.0")
    assert [text for _, text in chart.x_ticks] == ["1", "4"] and line.band
    assert all(charts.TOP < y < charts.BOTTOM for _, y, _, _ in line.points)
    assert charts.quality({"none": {1: [nan], 2: [0.0, 1e300]}}, "fid", "n") is None and charts.losses({}) is None
    for values in ((1e-99, 1e99), (5.0, 5.0), (99.9, 100.1), (0.3, 40000.0)):
        axis = charts.Axis.over("y", values, (charts.BOTTOM, charts.TOP), True)
        places = [place for place, _ in axis.ticks]
        assert 2 <= len(places) <= 9 and places == sorted(places, reverse=True)
        assert all(charts.TOP <= place <= charts.BOTTOM for place in places)
