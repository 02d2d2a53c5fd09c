"""The paper's configurations, value by value, and its networks by their number of parameters."""

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from smoke_losses import read_losses

from pdistill.commands.settings import settings_of
from pdistill.commands.sweep import PAPER_CIFAR10
from pdistill.errors import UserError
from pdistill.steps import stages
from pdistill.training.fit import accumulated_batches

CONF = Path(__file__).parent.parent / "conf"
COMMON = {
    "schedule.logsnr_min": -20,
    "schedule.logsnr_max": 20,
    "weighting.path": "pdistill.weighting.truncated_snr",
    "network.num_res_blocks": 3,
    "training.warmup_updates": 1000,
    "training.gradient_clip": 1,
    "training.ema_decay": 0.9999,
    "distillation.gradient_clip": 1,
    "distillation.ema_decay": None,
    "distillation.weight_decay": 0,
    "distillation.dropout": 0,
    "label_dropout": 0,
    "dataset.flips": True,
}
LARGE = {
    "parameterization._target_": "pdistill.parameterization.XEps",
    "network.emb_ch": 768,
    "network.attn_resolutions": [8, 16, 32],
    "network.head_dim": 64,
    "training.batch_size": 2048,
    "training.learning_rate": 3e-4,
    "training.weight_decay": 0,
    "training.dropout": 0.1,
    "distillation.batch_size": 2048,
    "distillation.learning_rate": 1e-4,
}
LSUN = LARGE | {"network.ch": 64, "network.ch_mult": [1, 2, 4, 6, 8], "conditional": False, "dataset.image_size": 128}
PAPER = {
    "cifar10": {
        "parameterization._target_": "pdistill.parameterization.X",
        "network.ch": 256,
        "network.emb_ch": 1024,
        "network.ch_mult": [1, 1, 1],
        "network.attn_resolutions": [8, 16],
        "network.head_dim": None,
        "conditional": False,
        "training.batch_size": 128,
        "training.learning_rate": 2e-4,
        "training.weight_decay": 1e-3,
        "training.dropout": 0.2,
        "distillation.batch_size": 128,
        "distillation.learning_rate": 5e-5,
    },
    "imagenet64": LARGE | {"network.ch": 192, "network.ch_mult": [1, 2, 3, 4], "conditional": True},
    "lsun_bedroom128": LSUN | {"dataset.category": "bedroom"},
    "lsun_church128": LSUN | {"dataset.category": "church_outdoor"},
}
IMAGES = {"cifar10": (32, 3, 8192), "imagenet64": (64, 6, 1024)}  # size, output channels, start steps; LSUN below


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("distill", ["name=test", *overrides])


@pytest.mark.parametrize("experiment", PAPER)
def test_recipe(experiment):
    cfg = composed(f"experiment={experiment}")
    for key, value in (COMMON | PAPER[experiment]).items():
        found = OmegaConf.select(cfg, key, throw_on_missing=True)
        assert (list(found) if OmegaConf.is_list(found) else found) == value, key

    size, channels, start = IMAGES.get(experiment, (128, 6, 1024))
    plan = stages(list(cfg.steps.plan), cfg.steps.updates, cfg.steps.updates_last_two)
    assert [s.num_steps for s in plan] == [start // 2**k for k in range(1, start.bit_length())]
    assert all(s.teacher_steps == 2 for s in plan)
    assert [s.updates for s in plan] == [50_000] * (len(plan) - 2) + [100_000] * 2

    with torch.device("meta"):
        network = instantiate(cfg.network)(size, 3, channels, num_classes=1000 if cfg.conditional else None)
    header = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert f"{millions:.1f}" == re.search(r"([\d.]+) M parameters", header)[1]


@pytest.mark.parametrize("experiment", ["best", "demo"])
@pytest.mark.parametrize("command", ["train", "distill"])
def test_the_recommended_recipe_is_one_stage_for_all_step_counts(command, experiment):
    """Its teacher may be trained alone, by the same words."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = settings_of(compose(command, ["name=test", f"experiment={experiment}"]))
    method = instantiate(settings.method)
    (stage,) = method.stages(settings.steps)
    assert stage.counts == (8, 4, 2, 1) and stage.grid == 32
    assert settings.weighting["_target_"] == "pdistill.weighting.min_snr_plus_one"


@pytest.mark.parametrize(
    ("words", "weighting"),
    [
        (["method=parallel_decoding"], "min_snr_plus_one"),
        (["method=parallel_decoding", "weighting=flow"], "flow"),
        (["method=parallel_decoding", "experiment=study_digits"], "snr_plus_one"),
        (["method=halving"], "truncated_snr"),
    ],
)
def test_a_method_may_bring_its_weighting_where_none_is_named(words, weighting):
    chosen = composed(*words).weighting
    assert str(chosen.get("path", chosen._target_)) == f"pdistill.weighting.{weighting}"


def test_the_ablation_is_the_recipe_at_1024_steps():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["name=test", "experiment=ablation"], return_hydra_config=True)
    assert cfg.steps.plan[0] == 1024 and cfg.training.dropout == 0.2
    swept = cfg.hydra.sweeper.params
    pairs = {(p, w) for p in swept.parameterization.split(",") for w in swept.weighting.split(",")}
    assert pairs == set(PAPER_CIFAR10)


@pytest.mark.parametrize(
    ("devices", "most", "batches"), [(64, None, 1), (64, 32, 1), (8, 64, 4), (1, 64, 32), (8, 100, 4), (3, None, None)]
)
def test_accumulation_fills_the_global_batch_on_fewer_devices(devices, most, batches):
    if batches is None:
        with pytest.raises(UserError, match="multiple of 3"):
            accumulated_batches(2048, devices, 1, most)
    else:
        assert accumulated_batches(2048, devices, 1, most) == batches


def test_accumulated_batches_train_as_one(run, workplace):
    """Updates are counted, not parts."""
    status, _, err = run(
        "train.py", "experiment=smoke", "max_batch_per_device=8", "metrics=none", "training.updates=12", "name=parts"
    )
    assert status == 0, err
    assert len(read_losses(workplace / "outputs" / "parts")["teacher"]) == 12  # updates, not 48 batches
    assert '"updates": 12' in (workplace / "outputs" / "parts" / "teacher" / "metrics.json").read_text()


@pytest.mark.parametrize("parameterization", ["x", *(pytest.param(p, marks=pytest.mark.slow) for p in ("x_eps", "v"))])
def test_exactly_zero_terminal_snr_is_trained_and_distilled(run, workplace, parameterization):
    name = f"zero-{parameterization}"
    settings = (f"parameterization={parameterization}", "schedule=cosine_zero_snr", "steps.plan=[4,1]")
    status, _, err = run("distill.py", "experiment=smoke", *settings, "metrics=none", f"name={name}")
    assert status == 0, err
    from pdistill.denoiser import Denoiser
    from pdistill.sampling import sample

    student = Denoiser.load(workplace / "outputs" / name / "steps-0001" / "denoiser")
    assert student.schedule(torch.ones(1)) == -torch.inf
    pictures = sample(student, torch.randn(4, 1, 8, 8), 1)
    assert pictures.isfinite().all() and pictures.std() > 0.1


@pytest.mark.parametrize("process", ["flow", "edm"])
def test_other_processes_are_trained_and_halved_to_one_step(run, workplace, process):
    """Flow matching and EDM from data to a 1-step student: losses fall, and the student's images are the teacher's."""
    from pdistill import Denoiser, sample
    from pdistill.randomness import sample_noise

    groups = [f"{group}={process}" for group in ("schedule", "parameterization", "weighting")]
    settings = ("training.updates=150", "steps.plan=[4,2,1]", "steps.updates=60", "steps.updates_last_two=60")
    options = ("distillation.learning_rate=1e-3", "metrics=none", f"name={process}")
    status, _, err = run("distill.py", "experiment=smoke", *groups, *settings, *options)
    assert status == 0, err
    directory = workplace / "outputs" / process
    losses = read_losses(directory)["teacher"]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    teacher, student = (Denoiser.load(directory / stage / "denoiser") for stage in ("teacher", "steps-0001"))
    noise = sample_noise(0, range(64), (1, 8, 8))
    theirs, ours = sample(teacher, noise, 4), sample(student, noise, 1)
    assert ours.isfinite().all() and ours.std() > 0.2
    untaught = sample(teacher, noise, 1)
    assert (ours - theirs).square().mean() < 0.7 * (untaught - theirs).square().mean()
