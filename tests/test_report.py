"""report.html, in a browser and out of one; the tables and curves behind it; what enters it, and what does not."""

import io
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from finished_runs import UNMEASURED, evaluated, make_run, write_evaluation
from PIL import Image
from wandb_workspaces.reports.v2 import Report

from pdistill.commands import report
from pdistill.errors import UserError
from pdistill.metrics.curve import measure_teacher, teacher_points
from pdistill.report import page, plots, tables
from pdistill.report.grids import nearest_neighbours, save_grid


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


@pytest.fixture
def old() -> Path:
    """A finished run of version 0.1.0."""
    return make_run("old", {"teacher": 5.5, "steps-0004": 6.0, "steps-0002": 7.25, "steps-0001": 8.5})


def test_a_run_of_the_first_version(old, capsys):
    (old / "csv" / "version_0").mkdir(parents=True)
    lines = ["step,teacher/loss,steps_0004/loss", "10,0.5,", "20,nan,", "10,,0.25", "3"]  # killed while it wrote
    (old / "csv" / "version_0" / "metrics.csv").write_text("\n".join(lines))
    report.show(old)
    out = " ".join(capsys.readouterr().out.split())
    assert "5.50" in out and "0.0016" in out and "8.0x" in out and "the fastest of three rounds" in out
    report.main([str(old), "--output", "pages/own.html"])
    text = Path("pages/own.html").read_text()
    assert "Losses" in text and "Cost" in text and "extractor_fingerprint" in text and "e1" in text
    assert "the fastest of three rounds" in text and "200 samples against the training set" in text
    assert "hydra.utils.get_method" in text and [p.name for p in Path("pages").iterdir()] == ["own.html"]
    plots.comparison_sheet(old, json.loads((old / "summary.json").read_text()))
    assert Image.open(old / "comparison.png").width > 500


def test_rows_of_weights_that_are_gone_do_not_enter(old, tiny):
    """A1: what was measured before a run was trained again is not the run's; what cannot say is marked."""
    rows = [evaluated(old, "distilled", num_steps, value) for num_steps, value in ((1, 8.5), (2, 7.75))]
    write_evaluation(old, [evaluated(old, "real images", None, 1.0), *rows])
    page.write([old], Path("old.html"))
    text = Path("old.html").read_text()
    assert (
        "distilled†" in text and "† weights unknown" in text and "7.75" in text and "distilled, weights unknown" in text
    )

    now = make_run("now", {"teacher": 5.5, "steps-0002": 7.0, "steps-0001": 9.0}, made={"version": "0.2.0"})
    for seed, stage in enumerate(("teacher", "steps-0002", "steps-0001")):
        tiny(seed=seed).save(now / stage / "denoiser")
    rows = [
        evaluated(now, "real images", None, 1.0),
        evaluated(now, "distilled", 2, 6.66, denoiser_fingerprint=tiny(seed=9).fingerprint),
        evaluated(now, "distilled", 2, 7.77, denoiser_fingerprint=tiny(seed=1).fingerprint),
        evaluated(now, "distilled", 1, 8.88),
    ]
    write_evaluation(now, rows)
    page.write([now], Path("now.html"))
    text = Path("now.html").read_text()
    assert "7.77" in text and "6.66" not in text and "8.88" not in text and "†" not in text
    shutil.copytree(now / "teacher" / "denoiser", now / "steps-0002" / "denoiser", dirs_exist_ok=True)
    page.write([now], Path("now.html"))
    assert "7.77" not in Path("now.html").read_text() and "real images" not in Path("now.html").read_text()


def test_reference_that_was_replaced_is_marked():
    real, sampled = (evaluated(Path("a"), *row) for row in (("real images", None, 1.0), ("distilled", 2, 3.0)))
    sampled["provenance"] |= {"denoiser_fingerprint": "w1", "reference_fingerprint": "r2"}
    _, lines, notes = tables.cells([real, sampled])
    assert [line[0] for line in lines] == ["distilled", "real images†"]
    assert notes == ["† measured otherwise: reference_fingerprint r1, there r2"]


def test_timings_on_a_busy_machine_are_said_to_vary():
    row = {"stage": "teacher", "num_steps": 8, "seconds_per_image": 0.2, "seconds_per_image_spread": 0.1}
    student = row | {"stage": "steps-0004", "num_steps": 4, "seconds_per_image": 0.1}
    quiet = " ".join(tables.stage_notes([row, student]))
    assert "the median over rounds in which all stages took turns" in quiet and "vary" not in quiet
    busy = " ".join(tables.stage_notes([row, student | {"seconds_per_image_spread": 0.35}]))
    assert "Timings vary by 35 %: the machine was busy." in busy
    none = [r | {"seconds_per_image": None, "seconds_per_image_spread": None} for r in (row, student)]
    assert tables.stages(none) == (["stage", "steps"], [["teacher", "8"], ["steps-0004", "4"]])


@pytest.mark.parametrize("value", [None, math.nan, math.inf, 0.0, -1e-6, UNMEASURED], ids=repr)
def test_no_value_of_a_metric_breaks_a_page(value, capsys):
    name = "run"
    run = make_run(name, {"teacher": value, "steps-0002": value, "steps-0001": value}, row={"seconds_per_image": None})
    other = make_run("other", {"teacher": 2.0, "steps-0002": value, "steps-0001": 3.0}, row={"seconds_per_image": 0})
    rows = [
        evaluated(run, label, n, None if value is UNMEASURED else value) for label, n in (("distilled", 2), ("b", 1))
    ]
    write_evaluation(run, [row | {"fid_classifier_std": None if value is UNMEASURED else value} for row in rows])
    (run / "steps-0001" / "samples.png").unlink()
    page.write([run, other], Path("page.html"))
    text = Path("page.html").read_text()
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert "steps-0001" in cells and not {"nan", "inf", "None", "nan ± nan"} & set(cells)
    report.show(run)
    assert "nan" not in capsys.readouterr().out
    plots.plot({"distilled": {1: [math.nan], 2: []}}, "FID", Path("curve.png"))
    assert Path("curve.png").exists()


@pytest.mark.parametrize(("low", "high"), [(1.1, 2.4), (7.2, 7.3), (0.5, 0.5), (1.2, 7), (2.8, 40)])
def test_a_curve_can_be_read(low, high):
    """Numbers stand beside its axis, however near to each other the values are."""
    figure = plots.draw({"distilled": {1: [high], 8: [low]}}, "FID")
    figure.savefig(io.BytesIO())
    axis = figure.axes[0].yaxis
    bottom, top = axis.get_view_interval()
    shown = [
        text
        for text in axis.get_ticklabels(which="both")
        if text.get_text() and bottom <= text.get_position()[1] <= top
    ]
    assert len(shown) >= 3


def test_several_runs_on_one_page(old):
    again = make_run("old", {"teacher": 5.0, "steps-0002": 6.0}, root=Path("elsewhere"), made={"version": "9.9.9"})
    page.write([old, again], Path("page.html"))
    text = Path("page.html").read_text()
    assert "Students of these runs" in text and "<h2>outputs/old</h2>" in text and "<h2>elsewhere/old</h2>" in text
    assert "9.9.9" in text
    other = make_run("b", {"teacher": 1.0, "steps-0002": 2.0}, provenance={"num_samples": 50, "tf32": {"matmul": True}})
    page.write([old, other], Path("page.html"))
    text = Path("page.html").read_text()
    assert "b was measured otherwise than old (num_samples 50, there 200)" in text and "tf32.matmul" in text


def test_what_is_no_run_is_said_in_a_line(old):
    unfinished = make_run("unfinished", {"teacher": 2.0})
    (unfinished / "teacher" / "metrics.json").unlink()
    damaged = make_run("damaged", {"teacher": 2.0})
    (damaged / "teacher" / "metrics.json").write_text("[]")
    Path("foreign").mkdir()
    for arguments, message in {
        ("foreign",): "foreign is no run of pdistill",
        ("outputs/none",): "outputs/none does not exist",
        (str(old), str(unfinished)): "unfinished has no finished stage yet",
        (str(damaged),): "damaged/teacher/metrics.json is damaged",
        (str(old), "--output=outputs"): "--output=outputs is a directory",
        (str(old), "--out-put=x"): "unrecognized arguments",
        (str(old), "wandb:us/digits"): "give no other run",
        ("wandb:digits",): "wandb:digits names no project",
        (): "runs",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            report.main(list(arguments))
        assert "\n" not in str(error.value)
    assert not list(Path().rglob("*.html"))


def test_the_teachers_curve_is_measured_anew_for_other_weights(outputs):
    path, measured = outputs / "run" / "teacher" / "curve.json", []

    def measure(num_steps: int, sampler: str) -> float:
        measured.append((num_steps, sampler))
        return float(len(measured))

    made_with = {"denoiser_fingerprint": "w1", "num_steps": 1, "sampler": "ddim"}
    measure_teacher(path, [1, 2], ["ddim"], measure, made_with)
    measure_teacher(path, [1, 2, 4], ["ddim"], measure, made_with | {"num_steps": 4})
    assert measured == [(1, "ddim"), (2, "ddim"), (4, "ddim")]
    assert teacher_points(outputs / "run") == {"ddim": {1: 1.0, 2: 2.0, 4: 3.0}}
    measure_teacher(path, [1], ["heun"], measure, made_with | {"denoiser_fingerprint": "w2"})
    assert teacher_points(outputs / "run") == {"heun": {1: 4.0}}
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"curve\.json is damaged"):
        teacher_points(outputs / "run")


def test_pictures(tmp_path):
    images = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
    for channels in (1, 2, 3, 4):
        for suffix in (".png", ".JPG", ".webp"):
            save_grid(images[:, :channels], tmp_path / f"grid{suffix}", nrow=2)
            assert Image.open(tmp_path / f"grid{suffix}").size == (2 * 50 + 2, 52)
    with pytest.raises(UserError, match="no format of pictures"):
        save_grid(images[:, :1], tmp_path / "grid")
    with pytest.raises(UserError, match="not finite"):
        save_grid(images[:, :1] / 0, tmp_path / "black.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.JPG", "grid.png", "grid.webp"]
    known = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    nearest = nearest_neighbours(known[2:3] / 127.5 - 1, known)
    assert nearest.shape == (1, 3, 1, 8, 8) and torch.equal(nearest[0, 0], known[2] / 127.5 - 1)


def test_report_of_a_wandb_project(monkeypatch, capsys):
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda path: runs))
    saved = []
    monkeypatch.setattr(Report, "save", lambda report: saved.append(report))
    monkeypatch.setattr(Report, "url", "https://wandb.example/report")
    runs = [SimpleNamespace(summary={"teacher/fid": 2.0, "steps_0002/fid": 3.0, "steps_0002/loss": 0.1})]
    report.main(["wandb:us/digits"])
    assert capsys.readouterr().out == "https://wandb.example/report\n"
    (grid,) = saved[0].blocks
    assert "summary:steps_0002/fid" in grid.runsets[0].visible_columns
    assert [metric.name for metric in grid.panels[0].metrics] == ["teacher/fid", "steps_0002/fid"]
    assert {"steps_0002/samples", "comparison"} <= set(grid.panels[3].media_keys)
    runs[0].summary = {}
    with pytest.raises(UserError, match="no run of us/digits has a metric"):
        report.main(["wandb:us/digits"])
    runs.clear()
    with pytest.raises(UserError, match="holds no runs"):
        report.main(["wandb:us/digits"])
