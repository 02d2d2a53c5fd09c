"""Whole runs, as a user starts them: finish, resume, refuse, sweep, several processes."""

import hashlib
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from smoke_losses import RECORDED, read_losses

STAGES = ["teacher", "steps-0004", "steps-0002", "steps-0001"]


def weights(directory: Path, stage: str) -> Path:
    return directory / stage / "denoiser" / "unet" / "diffusion_pytorch_model.safetensors"


def hashes(directory: Path) -> dict[str, str]:
    """Of every file of every exported denoiser."""
    files = sorted(p for p in directory.glob("*/denoiser/**/*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_run_leaves_what_it_promises(smoke, run):
    rows = json.loads((smoke / "summary.json").read_text())
    assert [(r["stage"], r["num_steps"]) for r in rows] == list(zip(STAGES, [8, 4, 2, 1], strict=True))
    assert all(r["fid_classifier"] > 0 and r["seconds_per_image"] > 0 for r in rows)
    for row in rows:
        assert json.loads((smoke / row["stage"] / "metrics.json").read_text()) == row
        assert Image.open(smoke / row["stage"] / "samples.png").width > 300
        assert (smoke / row["denoiser"] / "denoiser.json").exists()
    assert Image.open(smoke / "comparison.png").height > 100
    assert "data:image/png;base64," in (smoke / "report.html").read_text()
    assert not list(smoke.rglob("*.ckpt")) + list(smoke.rglob("*partial*"))
    logged = (smoke / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in ("loss", "gradient_norm", "learning_rate", "images_per_second", "loss_by_logsnr/0_5", "fid_classifier"):
        assert {f"teacher/{name}", f"steps_0004/{name}"} <= set(logged)
    lineage = json.loads((smoke / "steps-0001" / "denoiser" / "denoiser.json").read_text())["lineage"]
    assert lineage == ["teacher", 4, 2, 1]

    status, out, _ = run("distill.py", "experiment=smoke")
    assert status == 0 and "is finished" in out and "report.html" in out


def test_the_losses_are_the_recorded_ones(smoke):
    """Every update of every stage; 2 % covers other processors and thread counts."""
    ours, recorded = read_losses(smoke), json.loads(RECORDED.read_text())
    assert {stage: len(values) for stage, values in ours.items()} == {
        "teacher": 40,
        "steps_0004": 15,
        "steps_0002": 20,
        "steps_0001": 20,
    }
    for stage, values in recorded.items():
        assert ours[stage] == pytest.approx(values, rel=0.02), stage


def test_students_learn(smoke):
    before, after = (load_file(weights(smoke, s)) for s in STAGES[:2])
    assert any(not torch.equal(before[k], after[k]) for k in before if k != "time_proj.weight")


def test_an_interrupted_run_ends_byte_identical(smoke, start, run, workplace):
    """SIGKILL in the teacher, SIGTERM and Ctrl-C in later stages; each time the same command again."""
    command, directory = ("distill.py", "experiment=smoke", "name=interrupted"), workplace / "outputs" / "interrupted"
    kills = {"teacher": signal.SIGKILL, "steps-0004": signal.SIGTERM, "steps-0002": signal.SIGINT}
    for stage, number in kills.items():
        process = start(*command)
        deadline = time.monotonic() + 120
        while not (directory / stage / "last.ckpt").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode not in (0, None)
        assert not (directory / stage / "metrics.json").exists()
        if number != signal.SIGKILL:
            assert "the same command continues" in err and "Traceback" not in err
            assert "1/4 teacher: fid_classifier " in err or number == signal.SIGINT  # finished in a sitting before
    status, _, err = run(*command)
    assert status == 0, err
    assert hashes(directory) == hashes(smoke)
    assert "\r" not in err and "\x1b" not in err and err.startswith("digits: 1,797 images of 1x8x8, 10 classes; ")
    told = [line.split(": ")[0] for line in err.splitlines() if ": fid_classifier " in line]
    assert told == ["3/4 steps-0002", "4/4 steps-0001"]  # the others were finished, and count


def test_a_name_stands_for_one_configuration(smoke, run):
    before = hashes(smoke)
    status, _, err = run("distill.py", "experiment=smoke", "seed=1", "weighting=snr", "name=smoke")
    assert status == 2 and err.count("\n") == 1
    assert "seed: 1, was 0" in err and "weighting.path" in err and "overwrite=true" in err
    assert hashes(smoke) == before


def test_a_given_teacher_any_plan_and_a_student_ema(smoke, run, workplace):
    status, _, err = run(
        "distill.py",
        "experiment=smoke",
        f"teacher={smoke / 'teacher' / 'denoiser'}",
        "steps.plan=[24,6,2]",
        "distillation.max_teacher_steps=12",
        "distillation.ema_decay=0.9",
        "logger=tensorboard",
        "metrics=none",
        "name=given",
    )
    assert status == 0, err
    given = workplace / "outputs" / "given"
    a, b = (load_file(weights(d, "teacher")) for d in (given, smoke))
    assert all(torch.equal(a[k], b[k]) for k in a if k != "time_proj.weight")
    assert [r["num_steps"] for r in json.loads((given / "summary.json").read_text())] == [24, 6, 2]
    assert list((given / "tensorboard").glob("events*"))


def test_sweep_survives_a_failing_job_and_writes_its_table(run, workplace):
    status, out, err = run(
        "distill.py",
        "-m",
        "experiment=smoke",
        "parameterization=v,eps",
        "weighting=snr,snr_plus_one",
        "steps.plan=[2,1]",
        "training.updates=4",
        "steps.updates_last_two=3",
        "metrics.num_samples=100",
    )
    assert status == 2 and "2 of 4 jobs failed" in err and "Traceback" not in err
    table = (workplace / out.split("sweep: ")[1].split(" ")[0]).read_text().splitlines()
    assert len(table) == 6 and "fid_classifier teacher" in table[0] and "fid_classifier 1" in table[0]
    assert sum("| v |" in line for line in table) == 2 and sum("cannot be distilled" in line for line in table) == 2


@pytest.mark.parametrize(
    "parameterization", ["eps", "v", *(pytest.param(p, marks=pytest.mark.slow) for p in ("x", "x_eps"))]
)
def test_every_weighting_trains(run, workplace, parameterization):
    status, _, err = run(
        "train.py",
        "-m",
        "experiment=smoke",
        f"parameterization={parameterization}",
        "weighting=snr,truncated_snr,snr_plus_one,constant",
        "training.updates=6",
        "metrics=none",
    )
    assert status == 0, err
    assert len(list((workplace / "outputs").glob(f"smoke-{parameterization}-*-teacher*/teacher/denoiser"))) == 4


def test_two_processes_make_one_model_and_the_same_metrics(run, workplace):
    """Through the sweep, where a second rank that re-ran the command line would start the sweep again."""
    from pdistill.dataset import digits
    from pdistill.denoiser import Denoiser
    from pdistill.metrics.classifier import train_classifier
    from pdistill.metrics.fid import FID

    status, _, err = run("distill.py", "-m", "experiment=smoke", "trainer=ddp_cpu", "name=two", "seed=0")
    assert status == 0, err
    two = workplace / "outputs" / "two"
    row = json.loads((two / "summary.json").read_text())[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PDISTILL_CACHE", str(workplace / "cache"))
        fid = FID(train_classifier(digits()), digits(), row["num_samples"])
        value = fid.measure(Denoiser.load(two / "steps-0001" / "denoiser"), 1)
    assert value == pytest.approx(row["fid_classifier"], rel=1e-4)


def test_sample_does_not_depend_on_the_batch(smoke, run, workplace):
    pictures = []
    for batch_size in (5, 8):
        output = workplace / f"grid-{batch_size}.png"
        status, _, err = run(
            "sample.py",
            f"denoiser={smoke / 'steps-0004' / 'denoiser'}",
            "num_images=8",
            f"batch_size={batch_size}",
            "sampler=ancestral",
            "individual=true",
            f"output={output}",
        )
        assert status == 0, err
        pictures.append([Image.open(p).tobytes() for p in sorted(output.with_suffix("").iterdir())])
    assert len(pictures[0]) == 8
    differences = (abs(a - b) for one, two in zip(*pictures, strict=True) for a, b in zip(one, two, strict=True))
    assert max(differences) <= 1
