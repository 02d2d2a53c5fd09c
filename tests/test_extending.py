"""docs/extending.md, run as it stands: parts that live outside of this repository, by overrides."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from forked import Command
from PIL import Image

from pdistill import Denoiser, registry
from pdistill.errors import UserError
from pdistill.network import build
from pdistill.parameterization import V
from pdistill.schedule import CosineSchedule

ROOT = Path(__file__).parent.parent
GROUPS = {
    "weighting": "sqrt_snr",
    "parameterization": "half_v",
    "schedule": "linear",
    "network": "tiny",
    "dataset": "stripes",
    "metrics": "pixels",
    "optimizer": "sgd",
    "method": "patient",
    "callbacks": "counter",
}
OURS = [f"{group}={name}" for group, name in GROUPS.items()]
QUICK = ["training.updates=30", "training.warmup_updates=5", "steps.plan=[4,2,1]", "steps.updates=8"]
QUICK += ["steps.updates_last_two=8", "checkpoint_every_n_updates=5", "trainer.log_every_n_steps=10"]


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """A directory with the files of docs/extending.md, and nothing of this repository."""
    folder = tmp_path_factory.mktemp("outside")
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"`(my_[\w./]+)`[^\n]*:\n\n```\w+\n(.*?)```", page, re.S)
    assert len(blocks) == 10
    for name, content in blocks:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def start(outside: Path, *words: str) -> Command:
    paths = os.pathsep.join([str(outside), str(ROOT / "src")])
    environment = os.environ | {"PYTHONPATH": paths, "PDISTILL_CACHE": str(outside / "cache")}
    return Command("pdistill.commands.cli", *words, cwd=outside, env=environment)


def pdistill(outside: Path, *words: str) -> subprocess.CompletedProcess:
    return start(outside, *words).finished(timeout=300)


@pytest.fixture(scope="module")
def mine(outside) -> Path:
    """A finished run of own parts alone; interrupted once on its way."""
    command = ("distill", "--config-dir", "my_conf", "imports=[my_parts]", *OURS, *QUICK, "name=mine")
    done = pdistill(outside, *command)
    assert done.returncode == 0, done.stderr
    return outside / "outputs" / "mine"


def test_trained_distilled_sampled_and_evaluated(outside, mine):
    rows = json.loads((mine / "summary.json").read_text())
    assert [row["num_steps"] for row in rows] == [4, 2, 1] and all(row["fid_pixels"] > 0 for row in rows)
    assert (outside / "updates.txt").read_text().split() == ["30", "8", "8"]
    described = json.loads((mine / "steps-0001" / "denoiser" / "denoiser.json").read_text())
    assert described["parameterization"] == {"name": "half_v"} and described["schedule"] == {
        "name": "linear",
        "top": 8.0,
    }
    assert described["network"]["name"] == "tiny" and described["network"]["arguments"]["width"] == 16
    choices = json.loads((mine / "run.json").read_text())["choices"]
    assert GROUPS.items() <= choices.items()

    grid = outside / "grid.png"
    words = ("imports=[my_parts]", f"denoiser={mine / 'steps-0001' / 'denoiser'}", "sampler=restart", "num_steps=4")
    done = pdistill(outside, "sample", *words, "num_images=4", f"output={grid}")
    assert done.returncode == 0 and Image.open(grid).width > 100, done.stderr
    done = pdistill(outside, "evaluate", "--config-dir", "my_conf", f"denoiser={mine}", "metrics=pixels", words[0])
    assert done.returncode == 0 and "fid_pixels" in done.stdout, done.stderr


def test_a_stopped_run_goes_on(outside, mine):
    """Killed inside the teacher's training: the result is the undisturbed run's."""
    command = ("distill", "--config-dir", "my_conf", "imports=[my_parts]", *OURS, *QUICK, "name=again")
    checkpoint = outside / "outputs" / "again" / "teacher" / "last.ckpt"
    process = start(outside, *command)
    while process.poll() is None and not checkpoint.exists():
        pass
    process.kill()
    process.communicate(timeout=60)
    done = pdistill(outside, *command)
    assert done.returncode == 0, done.stderr
    weights = [
        outside / "outputs" / name / "steps-0001/denoiser/network/model.safetensors" for name in ("mine", "again")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_they_stand_in_a_sweeps_table_by_their_names(outside):
    fixed = [word for word in OURS if word.split("=")[0] not in ("weighting", "optimizer", "method", "callbacks")]
    words = ("train", "-m", "--config-dir", "my_conf", "imports=[my_parts]", *fixed, *QUICK[:2], "steps.plan=[4,1]")
    done = pdistill(outside, *words, "weighting=sqrt_snr,snr", "optimizer=sgd,adamw", "name=swept")
    assert done.returncode == 0, done.stderr
    table = "".join(line for line in done.stdout.splitlines() if line.startswith("| "))
    assert table.count("sqrt_snr") == 2 and table.count("sgd") == 2 and table.count("adamw") == 2
    names = {p.name for p in (outside / "outputs").glob("swept*") if p.is_dir()}
    assert names == {f"swept-{w}-{o}" for w in ("sqrt_snr", "snr") for o in ("sgd", "adamw")}


def test_what_is_not_registered_is_refused_in_one_line(outside, mine, tmp_path):
    """And nothing is imported because a file says so."""
    done = pdistill(outside, "sample", f"denoiser={mine / 'steps-0001' / 'denoiser'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "'half_v' is neither built in" in done.stderr and "pdistill.register(" in done.stderr
    done = pdistill(outside, "sample", f"denoiser={mine}", "imports=[no_such_module]")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "PYTHONPATH" in done.stderr

    class Unregistered(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

    denoiser = Denoiser(Unregistered(3), V(), CosineSchedule(), image_shape=(1, 8, 8))
    with pytest.raises(UserError, match=r"is not registered.*pdistill.register\(\"network\""):
        denoiser.save(tmp_path / "denoiser")
    registry.register("network", "unregistered", Unregistered)
    with pytest.raises(UserError, match=r"arguments that nobody wrote down \(width\)"):
        denoiser.save(tmp_path / "denoiser")
    Denoiser(build(Unregistered, width=3), V(), CosineSchedule(), image_shape=(1, 8, 8)).save(tmp_path / "denoiser")
    assert Denoiser.load(tmp_path / "denoiser").image_shape == (1, 8, 8)
    with pytest.raises(UserError, match="registered already"):
        registry.register("network", "unregistered", torch.nn.Linear)
    with pytest.raises(UserError, match="there is no group"):
        registry.register("flavour", "mild", 1)
