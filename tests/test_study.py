"""The study of methods, tiny: what a budget pays for, one run, its table, and that nothing is done twice."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_benchmarks import benchmark
from test_training import new_denoiser

from pdistill.denoiser import Denoiser


@pytest.fixture(scope="module")
def study():
    return benchmark("study_methods")


@pytest.fixture
def teacher(smoke) -> Path:
    return smoke / "teacher" / "denoiser"


@pytest.fixture
def arguments(teacher, tmp_path, workplace, monkeypatch) -> list[str]:
    """Of a study of two updates at each of two stages."""
    monkeypatch.setenv("PDISTILL_CACHE", str(workplace / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = ["--rows", "halved twice: method=halving steps.plan=[4,2,1]"]
    common = ["--common", "distillation.batch_size=8", "trainer.enable_progress_bar=false"]
    sizes = ["--budget", "23", "--samples", "20", "--teacher-steps", "4", "--extractor-updates", "5"]
    return [str(teacher), *rows, *common, *sizes, "--seeds", "3", "--output", "study"]


def test_a_budget_pays_for_updates_in_their_proportion(study, teacher):
    """Of halving an update is 5 passes; 8 -> 2 at once is 3 + 4."""
    overrides = {"experiment": "study_methods", "teacher": str(teacher), "name": "a", "steps.updates": "2"}
    overrides |= {"steps.updates_last_two": "4", "distillation.max_teacher_steps": "4"}
    words = study.affordable(overrides | {"steps.plan": "[16,8,4,2]"}, 1000)
    # 8 from 16: 5 passes; 4 and 2 from what is four times finer: 3 + 4
    share = 1000 / (2 * 5 + 4 * 7 + 4 * 7)
    assert words[-2:] == [f"steps.updates={int(2 * share)}", f"steps.updates_last_two={int(4 * share)}"]


def test_a_study_and_its_second_call(study, arguments, monkeypatch, capfd):
    study.main(arguments)
    run = Path("study/runs/halved_twice-seed-3")
    found = json.loads(Path("study/results.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert [row["updates"] for row in summary] == [0, 2, 2]  # of 23 passes, 2 stages of 2 updates of 5 take 20
    assert [(row["name"], row["seed"], row["num_steps"]) for row in found["rows"]] == [
        ("halved twice", 3, 2),
        ("halved twice", 3, 1),
    ]
    for row in found["rows"]:
        assert row["network_passes"] == 20 and row["training_seconds"] > 0
        assert 0 < row["rms"] < 2 and 0 < row["nearest"] < 2
        assert row["ratio"] == row["fid_classifier"] / found["teachers"]["3"]["fid_classifier"]
        assert {"kid_classifier", "precision", "recall"} <= row.keys()
    table = Path("study/results.md").read_text()
    assert "| halved twice | 3 |" in table and "two halves of the real images" in table
    assert Path("study/results.png").exists()
    shown = Path("study/results.html").read_text()
    assert (
        "Of 1 way to make students of 1 step, halved twice has the lowest fid_classifier" in shown and "<svg" in shown
    )

    before = {path: path.stat().st_mtime_ns for path in Path("study/runs").rglob("*")}
    monkeypatch.setattr(study, "exit_status", None)
    monkeypatch.setattr(study, "generate", None)
    study.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in Path("study/runs").rglob("*")} == before
    assert json.loads(Path("study/results.json").read_text()) == found
    capfd.readouterr()
    with pytest.raises(SystemExit, match=r"error: study/results.json has a run of another row or budget as 'halved"):
        study.main([*arguments, "--budget", "40"])
    shutil.rmtree("study/runs")  # another machine, to which the results were taken
    study.main(arguments)
    assert not os.path.exists("study/runs") and "| halved twice | 3 |" in capfd.readouterr().out
    with pytest.raises(SystemExit, match=r"error: study/results.json has another num_samples"):
        study.main([*arguments, "--samples", "30"])


def test_what_a_study_refuses(study, arguments):
    for changes, message in {
        ("--budget", "3"): "--budget 3 does not pay for an update of each stage: give at least 10",
        ("--rows", "a: method=no_such"): "no_such",
        ("--rows", "fine: method=halving steps.plan=[2,1]", "a: steps.plan=[8,3]"): "3 does not divide 8",
    }.items():
        with pytest.raises(SystemExit, match=message.replace("[", r"\[")) as refused:
            study.main([*arguments, *changes])
        assert "\n" not in str(refused.value)
    assert not os.path.exists("study/runs")


def test_rows_may_start_from_other_runs(study, tmp_path):
    rows = {"again": "teacher={runs}/first-seed-{seed}/steps-0002/denoiser steps.plan=[2,1]"}
    made = study.Study("t", rows, ["steps.plan=[8,4]"], 100, tmp_path).overrides("again", 7)
    assert made["teacher"] == f"{tmp_path}/runs/first-seed-7/steps-0002/denoiser" and made["steps.plan"] == "[2,1]"


def test_distance_to_the_teachers_images(study, tmp_path, workplace, monkeypatch):
    """The teacher itself, in as many steps, is at no distance; drawn once."""
    from pdistill.dataset import digits
    from pdistill.metrics.classifier import Classifier

    monkeypatch.setenv("PDISTILL_CACHE", str(workplace / "cache"))
    teacher: Denoiser = new_denoiser().eval()
    measurement = study.Measurement(teacher, 3, Classifier(1, 10), digits(), 10, "cpu", tmp_path)
    assert measurement.of_student(teacher, 3, 0)["rms"] == 0 < measurement.of_student(teacher, 1, 0)["rms"]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
