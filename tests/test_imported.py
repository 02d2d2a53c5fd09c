"""`distill.py teacher=<diffusers folder>`: what it takes from the teacher, conversion, no data, and what is refused."""

import json
import shutil
import time
from pathlib import Path

import diffusers
import pytest
import torch

from pdistill import Denoiser, load_diffusers_teacher, sample
from pdistill.commands.teachers import predicting
from pdistill.dataset import digits
from pdistill.dataset.batches import to_float
from pdistill.dataset.samples import teacher_samples
from pdistill.method.conversion import Conversion
from pdistill.parameterization import V
from pdistill.steps import Stage
from pdistill.weighting import truncated_snr

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def write(folder: Path, scheduler=None, **unet) -> Path:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**SMALL | unet)
    diffusers.DDPMPipeline(network, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def eps_teacher(tmp_path_factory, once) -> Path:
    """An epsilon model of digits, trained as diffusers' example does, with its own DDPMScheduler."""
    folder = tmp_path_factory.mktemp("eps") / "ddpm-digits"

    def make() -> None:
        torch.manual_seed(0)
        network, scheduler = diffusers.UNet2DModel(**SMALL), diffusers.DDPMScheduler()
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
        images = to_float(digits().images)
        for _ in range(400):
            x = images[torch.randint(len(images), (64,))]
            noise, timesteps = torch.randn_like(x), torch.randint(1000, (64,))
            output = network(scheduler.add_noise(x, noise, timesteps), timesteps).sample
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(output, noise).backward()
            optimizer.step()
        diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder)

    return once(folder, make)


def converted(teacher: Denoiser, clip: bool, updates: int = 200) -> Denoiser:
    torch.manual_seed(0)
    student, method = predicting(teacher, V()).train(), Conversion(clip=clip)
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    images = to_float(digits().images)
    stage = Stage(2, 8, 0, 1, updates, called="converted")
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - update / updates)
        x = images[torch.randint(len(images), (64,))]
        losses, _ = method.losses(student, teacher, stage, truncated_snr, x, None)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return student.eval()


@pytest.mark.slow
def test_targets_are_clipped_where_eps_says_little(eps_teacher):
    """The ablation: samples from the same noise as the teacher's own, after a conversion with and without clipping."""
    teacher = load_diffusers_teacher(eps_teacher)
    noise = torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    goal = sample(teacher, noise, 16)
    errors = {
        clip: float((sample(converted(teacher, clip), noise, 16) - goal).square().mean()) for clip in (True, False)
    }
    start = float((sample(predicting(teacher, V()), noise, 16) - goal).square().mean())
    print(f"mean squared difference from the teacher's samples: {errors}, before conversion {start:.3f}")
    assert errors[True] < 0.5 * errors[False] and errors[True] < 0.2 * start


CHAIN = ("distill.py", "experiment=smoke", "metrics=none", "steps.plan=[4,2]")


@pytest.fixture(scope="module")
def chain(run, workplace, eps_teacher) -> Path:
    """The run of an epsilon teacher, with nothing given but data and a plan."""
    status, _, err = run("distill.py", "experiment=smoke", f"teacher={eps_teacher}", "steps.plan=[8,4,2]", "name=chain")
    assert status == 0, err
    return workplace / "outputs" / "chain"


def test_from_an_epsilon_folder_to_a_student(chain, run, eps_teacher):
    """Teacher, converted teacher and students, in every table; network, schedule and time are the teacher's own."""
    rows = json.loads((chain / "summary.json").read_text())
    assert [(r["stage"], r["num_steps"]) for r in rows] == [
        ("teacher", 8),
        ("converted", 8),
        ("steps-0004", 4),
        ("steps-0002", 2),
    ]
    assert [r["updates"] for r in rows] == [0, 20, 20, 20] and all(r["fid_classifier"] > 0 for r in rows)
    assert [r["parent"] for r in rows] == [None, "teacher", "converted", "steps-0004"]
    teacher, between, student = (Denoiser.load(chain / s / "denoiser") for s in ("teacher", "converted", "steps-0002"))
    original = load_diffusers_teacher(eps_teacher)
    assert teacher.fingerprint == original.fingerprint
    assert between.num_steps is None and between.parameterization.name == student.parameterization.name == "v"
    assert student.schedule == original.schedule
    assert student.lineage == ["diffusers:ddpm-digits", "converted", 4, 2]
    page = (chain / "report.html").read_text()
    assert all(words in page for words in ("converted, 8 steps", "teacher, 8 steps", "<td>converted</td>"))
    made = json.loads((chain / "run.json").read_text())["choices"]
    assert (made["parameterization"], made["network"], made["schedule"]) == ("v", "of the teacher", "of the teacher")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(chain / "steps-0002" / "denoiser")
    assert len(pipeline(batch_size=2, num_inference_steps=2).images) == 2


def test_a_conversion_that_was_stopped_goes_on_to_the_same_bytes(chain, start, workplace, eps_teacher):
    command = ("distill.py", "experiment=smoke", f"teacher={eps_teacher}", "steps.plan=[8,4,2]", "name=stopped")
    for attempt in range(2):
        process = start(*command, "checkpoint_every_n_updates=3")
        if not attempt:
            stage = workplace / "outputs" / "stopped" / "converted"
            while not (stage / "last.ckpt").exists() and process.poll() is None:
                time.sleep(0.02)
            process.terminate()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for stage in ("converted", "steps-0002"):
        ours, theirs = (Denoiser.load(workplace / "outputs" / n / stage / "denoiser") for n in ("stopped", "chain"))
        assert ours.fingerprint == theirs.fingerprint


def test_teachers_that_predict_v_or_flow_are_halved_at_once(run, workplace, tmp_path):
    for scheduler, name in (
        (diffusers.DDIMScheduler(prediction_type="v_prediction"), "v"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow"),
    ):
        status, _, err = run(*CHAIN, f"teacher={write(tmp_path / name, scheduler)}", f"name=at_once_{name}")
        assert status == 0, err
        outputs = workplace / "outputs" / f"at_once_{name}"
        assert not (outputs / "converted").exists()
        assert Denoiser.load(outputs / "steps-0002" / "denoiser").parameterization.name == name


def test_an_epsilon_teacher_trained_here_is_converted_too(run, workplace):
    options = ("experiment=smoke", "metrics=none", "steps.plan=[4,2]", "schedule.logsnr_min=-8")
    status, _, err = run("train.py", *options, "parameterization=eps", "name=own_eps")
    assert status == 0, err
    teacher = workplace / "outputs" / "own_eps" / "teacher" / "denoiser"
    status, _, err = run("distill.py", *options, f"teacher={teacher}", "parameterization=v", "name=own_v")
    assert status == 0, err
    stages = [row["stage"] for row in json.loads((workplace / "outputs/own_v/summary.json").read_text())]
    assert stages == ["teacher", "converted", "steps-0002"]


def test_without_data(run, workplace, tmp_path):
    """The teacher's samples train, and are what metrics are against; classes take turns."""
    teacher = write(
        tmp_path / "classes",
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        num_class_embeds=3,
    )
    options = ("dataset=none", "dataset.num_images=300", "metrics.extractor.max_updates=20", "name=no_data")
    status, out, err = run(
        "distill.py", "experiment=smoke", f"teacher={teacher}", "steps.plan=[4,2]", "metrics.num_samples=50", *options
    )
    assert status == 0, err
    rows = json.loads((workplace / "outputs/no_data/summary.json").read_text())
    assert rows[0]["provenance"]["reference"] == "of 300 samples of the teacher"
    assert "against the samples of the teacher, not real images" in out
    status, out, err = run("evaluate.py", f"denoiser={workplace}/outputs/no_data", "metrics.num_samples=50")
    assert status == 0, err
    rows = json.loads((workplace / "outputs/evaluations/no_data.json").read_text())
    assert {row["provenance"]["reference"] for row in rows} == {"of 300 samples of the teacher"}


def test_samples_of_the_teacher_are_made_once(tmp_path, tiny, monkeypatch):
    """What is there is not drawn again, more only add to them, and other weights have others."""
    teacher = tiny()
    first = teacher_samples(teacher, 2, num_images=260, cache=str(tmp_path))
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")}
    assert len(files) == 2 and first.image_shape == (1, 8, 8) and len(first.images) == 260
    monkeypatch.setattr("pdistill.dataset.samples.generate", lambda *args: pytest.fail("drawn again"))
    again = teacher_samples(teacher, 2, num_images=260, cache=str(tmp_path))
    assert again.fingerprint == first.fingerprint
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")} == files
    monkeypatch.undo()
    assert torch.equal(teacher_samples(teacher, 2, num_images=510, cache=str(tmp_path)).images[:260], first.images)
    assert teacher_samples(tiny(seed=1), 2, num_images=260, cache=str(tmp_path)).fingerprint != first.fingerprint


def test_bad_input(told, tmp_path, eps_teacher, smoke, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    classes = write(tmp_path / "classes", num_class_embeds=3)
    wide = write(tmp_path / "wide", sample_size=(8, 16))
    large = write(tmp_path / "large", sample_size=16)
    for teacher, overrides, words in (
        (large, [], "makes images of 1x16x16 (channels, height, width) and dataset digits holds 1x8x8"),
        (wide, [], "makes images of 1x8x16"),
        (classes, [], "knows 3 classes and dataset digits has 10"),
        (eps_teacher, ["conditional=true"], "knows no classes"),
        (eps_teacher, ["parameterization=eps"], "cannot be distilled"),
        (eps_teacher, ["parameterization=x_eps"], "use parameterization=v or x"),
        (eps_teacher, ["network=cifar10"], "keeps its own network"),
        (eps_teacher, ["schedule=flow"], "keeps its own schedule"),
        (eps_teacher, ["teacher_revision=main"], "is a folder, and revision=main is for models on the hub"),
        (eps_teacher, ["conversion.updates=0"], "conversion.updates=0"),
        (eps_teacher, ["dataset=none", "dataset.num_images=0"], "dataset.num_images=0"),
        (smoke / "teacher/denoiser", ["teacher_null_label=3"], "is for diffusers models"),
        ("somebody/nothing-here", [], "the hub does not give it"),
        (tmp_path / "nowhere", [], "there is no folder"),
    ):
        status, err = told("distill.py", "metrics=none", f"teacher={teacher}", "name=refused", *overrides)
        assert status == 2 and words in err and err.count("\n") == 1, err
    for script in ("train.py", "distill.py"):
        status, err = told(script, "dataset=none", "name=refused")
        assert status == 2 and "no images to train a teacher on" in err and err.count("\n") == 1
    assert not Path("outputs/refused").exists()


def test_other_weights_at_the_same_place_are_noticed(told, chain, eps_teacher, tmp_path):
    shutil.copytree(eps_teacher, tmp_path / "moved")
    command = ("distill.py", "experiment=smoke", "steps.plan=[8,4,2]", "name=chain")
    assert told(*command, f"teacher={tmp_path / 'moved'}")[0] == 0
    write(tmp_path / "moved")
    status, err = told(*command, f"teacher={tmp_path / 'moved'}")
    assert status == 2 and "holds other weights now" in err


def test_an_imported_teacher_is_guided(told, tmp_path, workplace):
    """An epsilon model with a null class: converted, taught guidance, and halved; without an image."""
    folder = write(tmp_path / "model", num_class_embeds=11)
    given = (
        f"teacher={folder}",
        "teacher_null_label=10",
        "parameterization=v",
        "guidance=[1,3]",
        "name=led",
    )
    updates = ("conversion.updates=2", "guiding.updates=2", "steps.updates_last_two=2", "steps.plan=[2,1]")
    options = ("dataset=none", "dataset.num_images=20", "metrics=none", "distillation.batch_size=4")
    status, err = told("distill.py", *given, *updates, *options)
    assert status == 0, err
    student = Denoiser.load(workplace / "outputs" / "led" / "steps-0001" / "denoiser")
    assert student.lineage == ["diffusers:model", "converted", "guided", 1] and student.guidance == (1.0, 3.0)
    noise, label = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    assert sample(student, noise, 1, label, guidance=2.5).shape == noise.shape
