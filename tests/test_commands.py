"""What the command line promises: help, identity by content, launchers, sweeps, closed streams, older runs."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from finished_runs import make_run
from forked import Command, free_port
from PIL import Image

from pdistill import processes
from pdistill.commands import cli, names, run_directory
from pdistill.commands.settings import SETTINGS
from pdistill.errors import UserError

ROOT = Path(__file__).parent.parent
TINY = ["experiment=smoke", "training.updates=6", "steps.plan=[2,1]", "steps.updates_last_two=3", "metrics=none"]


def test_help_and_version(monkeypatch, capsys):
    def said(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pdistill", *words])
        cli.main()
        return capsys.readouterr().out

    assert said("--version").startswith("pdistill 0.2.")
    assert all(command in said("--help") for command in (*cli.COMPOSED, *cli.PLAIN))
    for command, settings in SETTINGS.items():
        page = said(command, "--help")
        fields = [f for f in settings.__dataclass_fields__.values() if f.type not in ("Any", None)]
        assert all(f.name in page for f in fields) and "seed=0  (int)" in page
        assert command == "sample" or "classifier, inception, none" in page
    monkeypatch.setattr(sys, "argv", ["pdistill", "trian"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no command 'trian'" in capsys.readouterr().err


def test_completion_knows_the_subcommands(workplace):
    def completed(line: str) -> set[str]:
        environment = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-m", "pdistill.commands.cli", "-sc", "query=bash"]
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=60)
        return set(done.stdout.split())

    assert completed("pdistill s") == {"sample", "status", "sweep"}
    assert {"weighting=snr", "weighting=truncated_snr"} <= completed("pdistill train weighting=")


def photos(folder: Path, colours: list[int]) -> list[str]:
    folder.mkdir(exist_ok=True)
    for k, colour in enumerate(colours):
        Image.fromarray(np.full((8, 8), colour, np.uint8)).save(folder / f"{k}.bmp")
    return [f"dataset.path={folder}", "dataset=image_folder", "dataset.image_size=8", "dataset.image_channels=1"]


def test_a_run_knows_its_data_by_content(run, told, workplace):
    """Added images are refused on resume; the same images elsewhere are the same data."""
    own = photos(workplace / "own", [0, 90, 180])
    command = ("train.py", *TINY, *own, "name=own")
    assert run(*command)[0] == 0
    directory = workplace / "outputs" / "own"
    (directory / "teacher" / "metrics.json").unlink()  # as if stopped just before
    photos(workplace / "own", [0, 90, 180, 255])
    status, err = told(*command)
    assert status == 2 and "begun with other data" in err and err.count("\n") == 1
    moved = photos(workplace / "moved", [0, 90, 180])
    status, _, err = run("train.py", *TINY, *moved, "name=own")
    assert status == 0, err
    status, err = told(*command)  # finished, and asked for with the other images
    assert status == 2 and "begun with other data" in err


def test_a_run_knows_its_teacher_by_content(run, told, smoke, workplace):
    """Retrained at its path: refused. Moved: the same."""
    teacher = workplace / "my_teacher"
    shutil.copytree(smoke / "teacher" / "denoiser", teacher)
    plan = [*TINY, "steps.plan=[4,2]", "name=taught"]
    assert run("distill.py", *plan, f"teacher={teacher}")[0] == 0
    shutil.move(teacher, workplace / "moved_teacher")
    status, err = told("distill.py", *plan, f"teacher={workplace / 'moved_teacher'}")
    assert status == 0, err
    shutil.copytree(smoke / "steps-0001" / "denoiser", teacher)
    status, err = told("distill.py", *plan, f"teacher={teacher}")
    assert status == 2 and "holds other weights now" in err and err.count("\n") == 1


def test_a_finished_teacher_is_trained_on_under_another_name(run, told, smoke, workplace):
    status, err = told("distill.py", "experiment=smoke", "training.updates=60")
    assert status == 0 or "smoke-training.updates-60" in err  # another default name: a run of its own
    status, err = told("distill.py", "experiment=smoke", "training.updates=60", "name=smoke")
    assert status == 2 and f"start={Path('outputs') / 'smoke'}/teacher/denoiser" in err
    start = f"start={smoke / 'teacher' / 'denoiser'}"
    status, _, err = run("train.py", "experiment=smoke", "training.updates=1", "metrics=none", start, "name=on")
    assert status == 0, err
    from safetensors.torch import load_file

    weights = "denoiser/unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(p / "teacher" / weights) for p in (smoke, workplace / "outputs" / "on"))
    moved = sum(float((before[k] - after[k]).abs().mean()) for k in before if k != "time_proj.weight")
    assert 0 < moved < 1  # one update away, not a fresh network


def test_a_run_that_was_killed_at_an_odd_moment_goes_on(run, told, workplace):
    directory = workplace / "outputs" / "early"
    directory.mkdir(parents=True)
    (directory / "run.json").write_text('{"version": "0.2.0", "data": "of another command"}')
    (directory / ".config.yaml.1.partial").touch()
    words = ("train.py", "experiment=smoke", "training.updates=1", "metrics=none", "name=early")
    status, _, err = run(*words)
    assert status == 0, err
    assert json.loads((directory / "run.json").read_text())["data"] != "of another command"
    for file in ("summary.json", "teacher/metrics.json"):  # as if killed while the trained teacher was drawn
        (directory / file).unlink(missing_ok=True)
    (directory / "teacher" / ".denoiser.1.replaced").mkdir()
    (directory / "teacher" / "film" / ".0000001.png.1.partial").touch()
    status, _, err = run(*words)
    assert status == 0 and not list(directory.rglob(".*")), err
    (directory / "config.yaml").unlink()  # now it holds a teacher, whosever that is
    status, err = told(*words)
    assert status == 2 and "is no run of pdistill (no config.yaml)" in err and err.count("\n") == 1


def test_runs_of_version_0_1_0(told, workplace):
    """A finished one is finished; an unfinished one is refused in a line that names the version."""
    old = workplace / "outputs" / "old"
    make_run("old", {"teacher": 2.0, "steps-0004": 3.0, "steps-0002": 3.0, "steps-0001": 4.0}, root=old.parent)
    status, err = told("distill.py", "experiment=smoke", "name=old")
    assert status == 0, err
    status, err = told("distill.py", "experiment=smoke", "name=old", "seed=77")
    assert status == 2 and "seed: 77, was 0" in err
    (old / "summary.json").unlink()
    status, err = told("distill.py", "experiment=smoke", "name=old")
    assert status == 2 and "unfinished run of version 0.1.0" in err and err.count("\n") == 1


def test_the_jobs_of_a_sweep_with_a_name(run, workplace):
    """The name is the prefix of each job's; with several devices and overwrite no job deletes another."""
    words = ("train.py", "-m", *TINY[:2], "metrics=none", "steps.plan=[2,1]")
    status, out, err = run(*words, "name=pair", "weighting=snr,constant", "seed=0,1", "overwrite=true")
    assert status == 0, err
    names = {p.name for p in (workplace / "outputs").glob("pair*")}
    assert names == {f"pair-{w}-seed-{s}" for w in ("snr", "constant") for s in (0, 1)}
    words = (*words, "trainer=ddp_cpu", "overwrite=true", "training.batch_size=32,64")
    status, out, err = run(*words, "name=twice")
    assert status == 0, err
    rows = [json.loads(p.read_text()) for p in (workplace / "outputs").glob("twice-*/teacher/metrics.json")]
    assert sorted(row["training_images"] for row in rows) == [6 * 32, 6 * 64]
    assert "| 32 |" in out and "| 64 |" in out


def test_what_a_job_gives_to_an_optimising_sweeper(smoke, told, workplace):
    last = json.loads((smoke / "steps-0001" / "metrics.json").read_text())["fid_classifier"]
    assert run_directory.last_metric(smoke) == last
    assert run_directory.last_metric(workplace) is None


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_that_others_started(workplace, launcher):
    """Both come up by themselves: one main process writes, and both train."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"PDISTILL_CACHE": str(workplace / "cache")}
    variables = {
        "torchrun": lambda k: {
            "RANK": k,
            "LOCAL_RANK": k,
            "GROUP_RANK": 0,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_RESTART_COUNT": 0,
        },
        "srun": lambda k: {
            "SLURM_PROCID": k,
            "SLURM_LOCALID": k,
            "SLURM_NODEID": 0,
            "SLURM_NTASKS": 2,
            "SLURM_NTASKS_PER_NODE": 2,
            "SLURM_JOB_NUM_NODES": 1,
            "SLURM_NNODES": 1,
            "SLURM_JOB_ID": 1234,
            "SLURM_JOB_NAME": "train",
            "SLURM_NODELIST": "127.0.0.1",
        },
    }[launcher]
    words = (*TINY, "trainer=ddp_cpu", f"name={launcher}")
    ranks = []
    for k in range(2):
        environment = os.environ | common | {key: str(value) for key, value in variables(k).items()}
        ranks.append(Command(ROOT / "train.py", *words, cwd=workplace, env=environment))
    said = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert json.loads((workplace / "outputs" / launcher / "teacher" / "metrics.json").read_text())["updates"] == 6
    assert "teacher:" in said[0][0] and not said[1][0].strip()


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "0"}, 3),  # torchrun on the second of two nodes
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, 5),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, 1),  # Lightning's own, by hand on each node
        ({"LOCAL_RANK": "1"}, 1),
        ({"OMPI_COMM_WORLD_RANK": "2"}, 2),
    ],
)
def test_who_is_the_main_process(monkeypatch, variables, rank):
    for name in (*processes.RANK_VARIABLES, "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.rank() == rank and processes.is_main() == (rank == 0)


def test_streams_that_are_closed(smoke, workplace):
    """`>&-`: no stack trace, and the files are written."""
    words = f"{sys.executable} {ROOT / 'sample.py'} denoiser={smoke / 'steps-0001' / 'denoiser'} num_images=4"
    for k, closed in enumerate((">&-", "2>&-", ">&- 2>&- <&-")):
        grid = workplace / f"closed-{k}.png"
        done = subprocess.run(["bash", "-c", f"{words} output={grid} {closed}"], cwd=workplace, capture_output=True)
        assert done.returncode == 0 and grid.exists() and b"Traceback" not in done.stderr


def test_openmp_threads_wait_briefly(workplace):
    """As libgomp itself reports when torch loads it; what the user says counts more."""

    def reported(**variables: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        environment |= {"OMP_DISPLAY_ENV": "verbose", "PDISTILL_CACHE": str(workplace / "cache")} | variables
        command = [sys.executable, str(ROOT / "sample.py"), "denoiser=absent"]
        return subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True).stderr

    assert "GOMP_SPINCOUNT = '10000'" in reported()
    assert "GOMP_SPINCOUNT = '77'" in reported(GOMP_SPINCOUNT="77")
    assert "GOMP_SPINCOUNT = '10000'" not in reported(OMP_WAIT_POLICY="passive")


def test_names_are_short_and_never_collide(monkeypatch):
    long = names.shortened(["smoke", "x" * 150, "seed-1"])
    other = names.shortened(["smoke", "x" * 150, "seed-2"])
    assert len(long) == len(other) == 120 and long != other
    assert names.shortened(["a", "steps.plan-[4,2,1]"]) == "a-steps.plan-4_2_1"
    with pytest.raises(UserError, match="one directory name"):
        run_directory.directory_of("x" * 300, "outputs")


def test_seconds_per_image_are_measured_in_turns(tiny, monkeypatch):
    import torch

    from pdistill.commands import timing

    asked = []
    monkeypatch.setattr(timing, "sample", lambda d, z, n, c: (asked.append(n), d.network.conv_in(z))[1])
    monkeypatch.setattr(timing, "BUDGET", math.inf)
    rows = timing.time_stages([tiny(), tiny()], [8, 1], torch.device("cpu"))
    assert asked == [1, 1, *[8, 1] * timing.ROUNDS]
    assert all(row["seconds_per_image"] > 0 and row["seconds_per_image_spread"] >= 0 for row in rows)
    monkeypatch.setattr(timing, "BUDGET", 0.0)  # long samplers are timed in part, and scaled up
    (row,) = timing.time_stages([tiny()], [8192], torch.device("cpu"))
    assert row["timed_steps"] == 1 and "timed_steps" not in rows[0]
