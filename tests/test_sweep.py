"""Tables over runs: seeds as one row, the paper beside ours, and what is not compared."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from pdistill import sweep
from pdistill.errors import UserError

CONF = Path(__file__).parent.parent / "conf"


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def make_run(name: str, fids: dict[str, float], *overrides: str, ancestral: float | None = None, **provenance) -> None:
    """A finished run's files, without the run."""
    directory = Path("outputs") / name
    for stage, fid in fids.items():
        (directory / stage).mkdir(parents=True)
        num_steps = 1024 if stage == "teacher" else int(stage.split("-")[1])
        row = {"stage": stage, "num_steps": num_steps, "fid": fid, "provenance": {"num_samples": 100} | provenance}
        row |= {"seconds_per_image": 0.1}
        Image.new("L", (8, 8)).save(directory / stage / "samples.png")
        (directory / stage / "metrics.json").write_text(json.dumps(row))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        OmegaConf.save(compose("distill", [f"name={name}", *overrides]), directory / "config.yaml")
    (directory / "summary.json").write_text("[]")
    points = {"ddim": {"1": 50.0, "1024": fids["teacher"]}} | ({"ancestral": {"1024": ancestral}} if ancestral else {})
    (directory / "teacher" / "curve.json").write_text(json.dumps(points))


def test_the_papers_table_has_its_figures_beside_ours(capsys):
    for seed, fid in ((0, 3.0), (1, 3.5)):
        make_run(f"v{seed}", {"teacher": fid}, ancestral=fid - 0.25)
    make_run("x", {"teacher": 2.0})
    choices = {"dataset": "cifar10", "weighting": "snr"}
    jobs = [sweep.Job(f"v{seed}", choices | {"parameterization": "v", "seed": str(seed)}) for seed in (0, 1)]
    sweep.finish([*jobs, sweep.Job("x", choices | {"parameterization": "x", "seed": "0"})])
    table = capsys.readouterr().out.strip().splitlines()
    assert table[0].endswith("| seed | fid teacher | fid teacher, ancestral | paper, DDIM | paper, stochastic |")
    assert table[2] == "| v | snr | 0, 1 | 3.250 ± 0.354 | **3.000 ± 0.354** | 3.05 | 2.65 |"
    assert table[3] == "| x | snr | 0 | **2.000** |  | 2.75 | 2.65 |"


def test_any_runs_are_collected_and_seeds_give_curves(capsys, outputs):
    make_run("a", {"teacher": 2.0, "steps-0002": 3.0, "steps-0001": 4.0}, "parameterization=x_eps")
    make_run("b", {"teacher": 4.0, "steps-0002": 5.0, "steps-0001": 12.0}, "parameterization=x_eps", "seed=1")
    sweep.finish(sweep.collect(["outputs/a", "outputs/b"]))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| x_eps | truncated_snr | 0, 1 | 3.000 ± 1.414 |") for line in lines)
    assert "| 1 | 8.000 ± 5.657 | 50.000 ± 0.000 | 2.500 ± 0.707 |" in lines
    assert len(list(outputs.glob("sweep-*/curve.png"))) == 1
    (page,) = (path.read_text() for path in outputs.glob("sweep-*/report.html"))
    assert "<h2>a</h2>" in page and "<h2>b</h2>" in page and "Students of these runs" in page


def test_an_unfinished_run_is_listed(capsys):
    make_run("a", {"teacher": 2.0, "steps-0002": 3.0})
    make_run("b", {"teacher": 4.0}, "seed=1")
    Path("outputs/b/summary.json").unlink()
    with pytest.raises(UserError, match="1 of 2 jobs failed: b"):
        sweep.finish(sweep.collect(["outputs/a", "outputs/b"]))
    assert "not finished" in capsys.readouterr().out


def test_runs_of_wandb(capsys, monkeypatch):
    make_run("a", {"teacher": 2.0}, "parameterization=x_eps")
    config = OmegaConf.to_container(OmegaConf.load("outputs/a/config.yaml"))
    figures = {"teacher/fid": 2.0, "teacher/num_steps": 1024, "steps_0002/fid": 3.0, "steps_0002/num_steps": 2}
    finished = {"state": "finished", "summary": figures | {"provenance": {"num_samples": 100}}}
    other = {"state": "crashed", "summary": {"teacher/loss": 1.0}}
    runs = [SimpleNamespace(name=f"w{k}", config=config | {"seed": k}, **finished) for k in (0, 1)]
    runs.append(SimpleNamespace(name="w2", config=config | {"seed": 2}, **other))
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda project: {"us/digits": runs}[project]))
    with pytest.raises(UserError, match="1 of 3 jobs failed: w2"):
        sweep.finish(sweep.collect(["wandb:us/digits"]))
    out = capsys.readouterr().out
    assert "| x_eps | truncated_snr | 0, 1 | **2.000 ± 0.000** | **3.000 ± 0.000** |" in out and "crashed" in out
    with pytest.raises(UserError, match="W&B does not give the runs of us/none"):
        sweep.collect(["wandb:us/none"])


def test_figures_of_different_provenance_are_no_comparison(capsys):
    make_run("a", {"teacher": 2.0})
    make_run("b", {"teacher": 1.0}, "weighting=snr", num_samples=200)
    with pytest.raises(UserError, match=r"b was measured otherwise .*num_samples 200, there 100"):
        sweep.collect(["outputs/a", "outputs/b"])
    sweep.finish([sweep.Job(name, {"parameterization": "v", "weighting": name}) for name in "ab"])
    assert "num_samples 200, there 100" in capsys.readouterr().out
    with pytest.raises(UserError, match="outputs/c is no run"):
        sweep.collect(["outputs/a", "outputs/c"])
