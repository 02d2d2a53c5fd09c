"""Tables over runs: seeds as one row, the paper beside ours, parts by their names, and what is not compared."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from finished_runs import UNMEASURED, make_run
from omegaconf import OmegaConf

from pdistill.commands import sweep
from pdistill.errors import UserError

V, X_EPS = ({"parameterization._target_": f"pdistill.parameterization.{cls}"} for cls in ("V", "XEps"))
SNR = {"weighting.path": "pdistill.weighting.snr"}


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def test_the_papers_table_has_its_values_beside_ours(capsys):
    for seed, fid in ((0, 3.0), (1, 3.5)):
        make_run(f"v{seed}", {"teacher": fid}, ancestral=fid - 0.25)
    make_run("x", {"teacher": 2.0})
    choices = {"dataset": "cifar10", "weighting": "snr", "steps": "demo"}
    jobs = [sweep.Job(f"v{seed}", choices | {"parameterization": "v", "seed": str(seed)}) for seed in (0, 1)]
    sweep.finish([*jobs, sweep.Job("x", choices | {"parameterization": "x", "seed": "0"})])
    table = capsys.readouterr().out.strip().splitlines()
    columns = "seed | fid_classifier teacher | fid_classifier teacher, ancestral | paper, DDIM | paper, stochastic"
    assert table[0] == f"| parameterization | weighting | {columns} |"
    assert table[2] == "| v | snr | 0, 1 | 3.25 ± 0.35 | 3.00 ± 0.35 | 3.05 | 2.65 |"
    assert table[3] == "| x | snr | 0 | **2.00** |  | 2.75 | 2.65 |"


def test_any_runs_are_collected_and_seeds_give_curves(capsys, outputs):
    make_run("a", {"teacher": 2.0, "steps-0002": 3.0, "steps-0001": 4.0}, X_EPS)
    make_run("b", {"teacher": 4.0, "steps-0002": 5.0, "steps-0001": 12.0}, X_EPS | {"seed": 1})
    make_run("c", {"teacher": 3.0, "steps-0002": 4.0, "steps-0001": 8.0}, X_EPS | {"seed": 2})
    Path("outputs/c/teacher/curve.json").unlink()  # measured in two of three runs
    sweep.main(["outputs/a", "outputs/b/", "outputs/c"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| x_eps | truncated_snr | 0, 1, 2 | 3.0 ± 1.0 |") for line in lines)
    assert "| 1 | 8.0 ± 4.0 | 50.0 ± 0 | 2.50 ± 0.71 |" in lines
    assert len(list(outputs.glob("sweep-*/curve.png"))) == 1
    (page,) = (path.read_text() for path in outputs.glob("sweep-*/report.html"))
    assert "<h2>a</h2>" in page and "<h2>b</h2>" in page and "Students of these runs" in page
    assert not list(outputs.rglob("*.partial"))


def test_own_parts_stand_by_their_names(capsys):
    """In run.json they have names; without one, the last part of their import path is the name."""
    own = {"weighting": {"_target_": "hydra.utils.get_method", "path": "mine.parts.flat"}}
    own |= {"parameterization": {"_target_": "mine.parts.Skewed"}, "dataset": {"_target_": "mine.data.moons"}}
    make_run("a", {"teacher": 2.0, "steps-0002": 3.0})
    make_run("b", {"teacher": 2.0, "steps-0002": 4.0}, own | {"method": {"_target_": "mine.methods.Jump"}})
    make_run("hub", {"teacher": 2.0}, {"dataset": {"_target_": "pdistill.huggingface.load", "path": "x"}})
    sweep.main(["outputs/a", "outputs/b", "outputs/hub"])
    table = capsys.readouterr().out.strip().splitlines()
    head = [cell.strip() for cell in table[0].split("|")[1:-1]]
    rows = [dict(zip(head, [c.strip() for c in line.split("|")[1:-1]], strict=True)) for line in table[2:5]]
    parts = [[row[group] for group in ("parameterization", "weighting", "dataset", "method")] for row in rows]
    assert parts == [
        ["x", "truncated_snr", "digits", "halving"],
        ["Skewed", "flat", "moons", "Jump"],
        ["x", "truncated_snr", "huggingface", "halving"],
    ]
    names = {"parameterization": "v", "weighting": "mine", "method": "halving", "trainer": "cpu", "hydra/launcher": "x"}
    for k, method in enumerate(("halving", "jump")):
        config = {"optimizer": {"_target_": "pdistill.optimizer.adamw"}, "method": {"_target_": f"any.{method}"}}
        run = {"version": "0.2.0", "choices": names | {"method": method, "trainer": f"cpu{k}"}}
        make_run(f"new{k}", {"teacher": 2.0 + k}, config | {"trainer.devices": k + 1}, made=run)
    sweep.main(["outputs/new0", "outputs/new1"])
    table = capsys.readouterr().out.strip().splitlines()
    assert table[0] == "| parameterization | weighting | method | fid_classifier teacher |"
    assert table[2:4] == ["| v | mine | halving | **2.00** |", "| v | mine | jump | 3.00 |"]
    sweep.main(["outputs/a", "outputs/new0"])  # one of 0.1.0 and one of today: what is new since is no difference
    table = capsys.readouterr().out.strip().splitlines()
    assert table[0] == "| parameterization | weighting | fid_classifier teacher | fid_classifier 2 |"
    assert table[2:4] == ["| x | truncated_snr | **2.00** | 3.00 |", "| v | mine | **2.00** |  |"]


def test_whatever_differs_is_a_column_and_never_taken_for_a_seed(capsys):
    for k, changed in enumerate(({"network.ch": 64}, {"steps.plan": [8, 2]}, {"training.updates": 5}, {})):
        make_run(f"r{k}", {"teacher": 2.0 + k}, changed | {"logger": {"_target_": f"other{k}"}, "output_root": f"o{k}"})
    sweep.main([f"outputs/r{k}" for k in range(4)])
    table = capsys.readouterr().out.strip().splitlines()
    assert table[0].startswith("| parameterization | weighting | network.ch | steps.plan | training.updates | fid")
    assert len(table[2:6]) == 4 and table[2].startswith("| x | truncated_snr | 64 | [8, 4, 2, 1] | 40 |")
    choices = {"parameterization": "x", "weighting": "snr", "hydra/launcher": "joblib", "name": "n"}
    jobs = [
        sweep.Job(f"r{k}", choices | {"experiment": e, "name": e, "trainer.devices": str(k)})
        for k, e in enumerate("ab")
    ]
    sweep.finish(jobs)
    assert capsys.readouterr().out.startswith("\n| parameterization | weighting | experiment | fid")


def test_teachers_and_data_are_told_apart_by_content(capsys):
    """Paths are not: the same teacher lies at two places, or one of two at the same place."""
    new = {"optimizer": {"_target_": "pdistill.optimizer.adamw"}}
    for k, (teacher, weights, path) in enumerate((("t/a", "w1", "x"), ("t/b", "w1", "y"), ("t/b", "w2", "y"))):
        made = {"version": "0.2.0", "choices": {"dataset": "image_folder"}, "teacher": weights, "data": "d1"}
        make_run(f"r{k}", {"teacher": 2.0 + k}, new | {"teacher": teacher, "seed": k, "dataset.path": path}, made=made)
    sweep.main(["outputs/r0", "outputs/r1", "outputs/r2"])
    table = capsys.readouterr().out.strip().splitlines()
    assert table[0] == "| parameterization | weighting | seed | teacher | fid_classifier teacher |"
    assert [line.split("|")[3:5] for line in table[2:4]] == [[" 0, 1 ", " w1 "], [" 2 ", " w2 "]]


def test_failed_and_unfinished_jobs_are_listed(capsys, outputs):
    make_run("a", {"teacher": 2.0, "steps-0002": 3.0})
    make_run("b", {"teacher": 4.0}, {"seed": 1})
    Path("outputs/b/summary.json").unlink()
    with pytest.raises(UserError, match="1 of 2 jobs failed: b"):
        sweep.main(["outputs/a", "outputs/b"])
    assert "not finished" in capsys.readouterr().out
    # as read back from what jobs in other processes left: one failed, one was killed and says nothing
    left = [("a", "0", None), ("gone", "1", None), ("bad", "2", "seed=-1 must be | 0")]
    with pytest.raises(UserError, match="2 of 3 jobs failed: gone, bad"):
        groups, outer = {"weighting": "mine", "trainer": "cpu"}, {"output_root": str(outputs)}
        results = [
            outer | {"name": name, "groups": groups, "choices": {"seed": seed}, "error": error}
            for name, seed, error in left
        ]
        sweep.finish([sweep.Job.of_result(result) for result in results])
    out = capsys.readouterr().out
    assert "|  | mine | 0 | 2.00 |" in out and "not finished" in out and r"seed=-1 must be \| 0" in out
    assert len(list(outputs.glob("sweep-*/ablation.csv"))) == 2


def test_values_that_are_missing_or_not_finite_are_empty_cells(capsys):
    make_run("a", {"teacher": 2.0, "steps-0002": math.nan, "steps-0001": None})
    make_run("b", {"teacher": 4, "steps-0002": None, "steps-0001": math.inf}, {"seed": 1})
    sweep.main(["outputs/a", "outputs/b"])
    table = capsys.readouterr().out.strip().splitlines()
    assert table[0] == "| parameterization | weighting | seed | fid_classifier teacher |"
    assert table[2] == "| x | truncated_snr | 0, 1 | 3.0 ± 1.4 |"
    make_run("c", {"teacher": UNMEASURED, "steps-0002": UNMEASURED})
    make_run("d", {"teacher": UNMEASURED, "steps-0002": UNMEASURED}, SNR)
    sweep.main(["outputs/c", "outputs/d"])
    assert "| x | snr |" in capsys.readouterr().out


def test_runs_of_wandb(capsys, monkeypatch):
    config = OmegaConf.to_container(OmegaConf.load(make_run("a", {"teacher": 2.0}, X_EPS) / "config.yaml"))
    summary = {"teacher/fid": 2.0, "teacher/num_steps": 8, "provenance": {"num_samples": 100}}
    last = {"steps_0001/fid": 3.0, "steps_0001/num_steps": 1.0, "steps_0001/loss_by_logsnr/0_5": 1.0}
    runs = [
        SimpleNamespace(name="w0", config=config, state="finished", summary=summary | last),
        SimpleNamespace(name="w1", config=config | {"seed": 1}, state="failed", summary=summary | last),
        SimpleNamespace(name="w2", config=config | {"seed": 2}, state="finished", summary=summary),  # interrupted
        SimpleNamespace(name="w3", config=config | {"seed": 3}, state="crashed", summary={"teacher/loss": 1.0}),
        SimpleNamespace(name="w4", config={"lr": 1}, state="finished", summary={"loss": 1.0}),
    ]
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda project: {"us/digits": runs}[project]))
    with pytest.raises(UserError, match="3 of 5 jobs failed: w2, w3, w4"):
        sweep.main(["wandb:us/digits"])
    out = capsys.readouterr().out
    assert "| x_eps | truncated_snr | 0, 1 |" in out and "2.00 ± 0" in out
    assert "| not finished |" in out and "not finished (crashed)" in out and "no run of pdistill" in out
    with pytest.raises(UserError, match=r"W&B does not give the runs of us/none .*wandb login"):
        sweep.main(["wandb:us/none"])
    with pytest.raises(UserError, match="wandb:digits names no project"):
        sweep.main(["wandb:digits"])


def test_metrics_of_different_provenance_are_no_comparison(capsys):
    make_run("a", {"teacher": 2.0})
    make_run("b", {"teacher": 1.0}, SNR, provenance={"num_samples": 100})
    with pytest.raises(UserError, match=r"b was measured otherwise .*num_samples 100, there 200"):
        sweep.main(["outputs/a", "outputs/b"])
    sweep.finish([sweep.Job(name, {"parameterization": "v", "weighting": name}) for name in "ab"])
    out = capsys.readouterr().out
    assert "num_samples 100, there 200" in out and "**" not in out  # nothing is the best of what is not compared


def test_what_is_no_run_is_said_in_a_line(outputs):
    make_run("a", {"teacher": 2.0})
    Path("outputs/damaged").mkdir()
    Path("outputs/damaged/config.yaml").write_text("a: [1")
    make_run("half", {"teacher": 2.0})
    Path("outputs/half/teacher/metrics.json").write_text('{"stage": "teach')
    for argument, message in {
        "outputs/c": "outputs/c is no run",
        "outputs/damaged": "outputs/damaged/config.yaml is damaged",
        "outputs/half": "outputs/half/teacher/metrics.json is damaged",
        "--seeds": "unrecognized",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            sweep.main(["outputs/a", argument])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="runs"):
        sweep.main([])
    with pytest.raises(UserError, match=r"imports=\[no.such\]: no.such cannot be imported"):
        sweep.main(["imports=[no.such]", "outputs/a"])
    assert not list(outputs.glob("sweep-*"))
    assert json.loads(Path("outputs/a/summary.json").read_text())
