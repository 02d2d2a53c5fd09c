"""The page of expected results: what its file gives, every experiment on it, the paper's scores as elsewhere."""

import datetime
import importlib.util
from pathlib import Path

import pytest

from pdistill.commands.sweep import PAPER_CIFAR10
from pdistill.errors import UserError
from pdistill.files import read_json

ROOT = Path(__file__).parent.parent
BENCHMARK = importlib.util.spec_from_file_location("expected_results", ROOT / "benchmarks" / "expected_results.py")
assert BENCHMARK and BENCHMARK.loader
expected_results = importlib.util.module_from_spec(BENCHMARK)
BENCHMARK.loader.exec_module(expected_results)
EXPERIMENTS = read_json(expected_results.SOURCE)


def test_the_page_is_what_its_file_gives():
    assert expected_results.PAGE.read_text() == expected_results.page(EXPERIMENTS), (
        "run: python benchmarks/expected_results.py"
    )


def test_every_experiment_is_on_it():
    assert set(EXPERIMENTS) == {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_say_where_they_are_from(name):
    told = EXPERIMENTS[name]
    assert name in told["command"] and told["command"].startswith("python ")
    if "date" in told:
        assert datetime.date.fromisoformat(told["date"]) and told["machine"]
    elif told["rows"]:
        assert not any("ours" in row for row in told["rows"])
        with pytest.raises(UserError, match="without their date and machine"):
            expected_results.section(name, told | {"rows": [{"what": "x", "ours": 1.0}]})


@pytest.mark.parametrize("name", ["ablation", "ablation_digits"])
def test_the_papers_table_is_that_of_sweeps(name):
    paper = {row["what"]: row["paper"] for row in EXPERIMENTS[name]["rows"]}
    known = {f"{p}, {w}, DDIM": ddim for (p, w), (ddim, _) in PAPER_CIFAR10.items()}
    assert paper == known | {f"{p}, {w}, stochastic": other for (p, w), (_, other) in PAPER_CIFAR10.items()}
