"""One student of several step counts: its heads, its training, and what is made of it."""

import copy
import json
import math
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_training import Numbered, StopAt, settings, weights

from pdistill import Denoiser, ddim_step, sample
from pdistill.commands import timing
from pdistill.errors import Interrupted, UserError
from pdistill.heads import Heads, blocks, first_heads, fused, grown, ratios_of
from pdistill.interop import export
from pdistill.method.parallel_decoding import ParallelDecoding
from pdistill.network import unet
from pdistill.registry import find
from pdistill.schedule import BetaSchedule, CosineSchedule, EdmSchedule, FlowSchedule, logsnr_on_grid
from pdistill.steps import Stage
from pdistill.training.data import ImageDataModule
from pdistill.training.distillation import DistillationModule
from pdistill.training.fit import fit
from pdistill.training.module import Recipe
from pdistill.training.settings import Distillation, Steps
from pdistill.weighting import constant, snr_plus_one

SCHEDULES = {
    "cosine": CosineSchedule(),
    "zero terminal SNR": CosineSchedule(logsnr_min=-math.inf),
    "flow": FlowSchedule(),
    "exploding": EdmSchedule(),
    "betas": BetaSchedule(tuple((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).tolist())),
}
STAGE = Stage(index=1, num_steps=4, teacher=0, teacher_steps=2, updates=6, counts=(4, 2, 1))


def uneven(denoiser: Denoiser, counts=(4, 2, 1), mean="x") -> Denoiser:
    """A student of a grid of 8 whose heads differ."""
    student = grown(denoiser, 8, counts, mean)
    torch.manual_seed(1)
    torch.nn.init.normal_(student.network.conv_out.weight, std=0.1)
    torch.nn.init.normal_(student.network.conv_out.bias, std=0.1)
    return student


def noise() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(start=st.integers(0, 7), stop=st.integers(1, 8), seed=st.integers(0, 99))
def test_the_mean_of_a_block_is_its_steps_in_one(schedule, start, stop, seed):
    """A DDIM step for each interval, by hand, against one step with the mean of the heads, in both means."""
    start, stop = sorted((start, stop)) if start != stop else (start, start + 1)
    process, generator = SCHEDULES[schedule], torch.Generator().manual_seed(seed)
    x, z_start = (torch.randn(8, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    logsnr = logsnr_on_grid(process, torch.arange(8, -1, -1, dtype=torch.float64), 8)
    alpha, sigma = process.alpha_sigma(logsnr)
    first, last = torch.tensor([start]), torch.tensor([stop])
    z, said = z_start[start], []
    for j in range(start, stop):
        velocity = (z / (alpha[j] + sigma[j]) - x[j]) * (alpha[j] + sigma[j]) / sigma[j]
        said.append(z_start[start] / (alpha[start] + sigma[start]) - velocity * sigma[start] / (alpha + sigma)[start])
        z = ddim_step(z[None], x[j][None], logsnr[j : j + 1], logsnr[j + 1 : j + 2], process.alpha_sigma)[0]
    for mean, predictions in (("x", x[start:stop]), ("velocity", torch.stack(said))):
        heads = Heads("x", ratios_of(process, 8), mean=mean)
        share = heads.weights(first, last)[0, start:stop]
        assert float(share.sum()) == pytest.approx(1)
        x_hat = share @ predictions
        step = (z_start[start][None], x_hat[None], logsnr[start : start + 1], logsnr[stop : stop + 1])
        assert torch.allclose(ddim_step(*step, process.alpha_sigma)[0], z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean", ["x", "velocity"])
@pytest.mark.parametrize("kind", ["x", "v", "x_eps", "flow", "edm"])
@torch.no_grad()
def test_fused_heads_are_their_mean(tiny, kind, mean):
    """The affine map of every parameterization: what the heads say apart, averaged, is what the fused layer says."""
    student = uneven(tiny(kind), mean=mean)
    heads: Heads = student.parameterization
    t = torch.tensor([1.0, 0.75, 0.5])
    alpha, sigma = (a[:, None, None, None] for a in student.schedule.alpha_sigma(student.schedule(t)))
    output = student.output(noise(), t)
    apart = [heads.inner.to_x(heads.mix(output, torch.eye(8)[j : j + 1]), noise(), alpha, sigma) for j in range(8)]
    share = blocks(heads, 4)[[0, 1, 2]].float()
    expected = torch.einsum("bk,kbchw->bchw", share, torch.stack(apart))
    before = torch.get_rng_state()
    assert torch.allclose(fused(student, 4)(noise(), t), expected, atol=1e-5)
    assert torch.equal(before, torch.get_rng_state())
    assert type(fused(student, 1).parameterization) is type(heads.inner)


@torch.no_grad()
def test_at_first_a_step_is_the_teachers(tiny):
    teacher = tiny("v")
    for num_steps in (4, 2, 1):
        ours = sample(grown(teacher, 8, (4, 2, 1)), noise(), num_steps)
        assert torch.allclose(ours, sample(teacher, noise(), num_steps), atol=1e-5)


class Exact:
    """The best denoiser of one image."""

    schedule = CosineSchedule()

    def __call__(self, z, t, condition=None):
        return torch.full_like(z, 0.3)


@pytest.mark.parametrize("mean", ["x", "velocity"])
def test_a_perfect_student_has_no_loss(mean):
    network = unet(8, 1, 1, 32, 32, [1], 1, [])  # whose output is zero: a bias of 0.3 makes it the teacher
    student = grown(Denoiser(network, find("parameterization", "x")(), Exact.schedule), 8, (4, 2, 1), mean)
    torch.nn.init.constant_(student.network.conv_out.bias, 0.3)
    x = torch.full((64, 1, 8, 8), 0.3)
    arguments = (Exact(), STAGE, snr_plus_one, x, None)
    loss, logsnr = ParallelDecoding(mean).losses(student, *arguments)
    assert float(loss.detach().max()) < 1e-6 and len(logsnr.unique()) == 8
    student.network.conv_out.bias.data[3] += 0.1
    assert float(ParallelDecoding(mean).losses(student, *arguments)[0].detach().max()) > 1e-3


def test_the_teacher_is_asked_where_the_earlier_heads_lead():
    """By hand, step by step, for every head of a block of eight."""
    seen = []

    class Teacher(Exact):
        def __call__(self, z, t, condition=None):
            seen.append((z, t))
            return torch.zeros_like(z)

    network = unet(8, 1, 1, 32, 32, [1], 1, [])
    student = grown(Denoiser(network, find("parameterization", "x")(), CosineSchedule()), 8, (1,))
    x_hat = torch.linspace(-1, 1, 8)
    student.network.conv_out.bias.data.copy_(x_hat)
    torch.manual_seed(0)
    stage = Stage(1, 1, 0, 8, 6, counts=(1,))
    ParallelDecoding(last=0.0).losses(student, Teacher(), stage, constant, torch.zeros(40, 1, 8, 8), None)
    (z_k, t_k) = seen[0]
    torch.manual_seed(0)
    torch.rand(4, 40, dtype=torch.float64)
    z = torch.randn(40, 1, 8, 8) * CosineSchedule().alpha_sigma(CosineSchedule()(torch.ones(1)))[1]
    heads = (8 - t_k * 8).round().int().tolist()
    assert set(heads) == set(range(8))
    for i, k in enumerate(heads):
        state = z[i : i + 1]
        for j in range(k):
            times = [logsnr_on_grid(CosineSchedule(), torch.tensor([8.0 - j - n]), 8) for n in (0, 1)]
            state = ddim_step(state, torch.full_like(state, float(x_hat[j])), *times)
        assert torch.allclose(z_k[i : i + 1], state, atol=1e-5)


def new_module(tiny, **recipe) -> DistillationModule:
    options = {"batch_size": 12, "ema_decay": 0.5, "learning_rate": 1e-3} | recipe
    return DistillationModule(tiny("v"), STAGE, Recipe(Distillation(**options), snr_plus_one), ParallelDecoding())


def test_a_resumed_stage_is_the_same_to_the_byte(tiny, tmp_path):
    def train(directory, **changes):
        fit(new_module(tiny), ImageDataModule(Numbered(), 12, seed=0, stage=1), settings(directory, **changes))

    train(tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        train(tmp_path / "resumed", callbacks=[StopAt(3)])
    train(tmp_path / "resumed")
    assert weights(tmp_path / "undisturbed") == weights(tmp_path / "resumed")
    student = Denoiser.load(tmp_path / "resumed" / "denoiser")
    assert student.step_counts == [4, 2, 1] and student.lineage == ["teacher", "parallel-0008"]


@pytest.mark.parametrize("num_steps", [4, 1])
@pytest.mark.parametrize("kind", ["v", "x_eps"])
def test_diffusers_opens_what_knows_several_counts(tiny, tmp_path, monkeypatch, kind, num_steps):
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    student = uneven(tiny(kind))
    student.num_steps = 4
    student.eval().save(tmp_path / "all")
    fused(student, num_steps).save(tmp_path / "one")
    ours = sample(Denoiser.load(tmp_path / "all"), noise(), num_steps)
    assert torch.equal(ours, sample(Denoiser.load(tmp_path / "one"), noise(), num_steps))
    for folder in ("all", "one"):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / folder, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(3, torch.Generator().manual_seed(5), num_inference_steps=num_steps, output_type="pt")
        assert (drawn.images * 2 - 1 - ours).abs().max() < 1e-3


@torch.no_grad()
def test_the_exported_sampler_is_ours(tiny):
    student = fused(uneven(tiny("v")), 4)
    module = export.Sampler(student, export.Graph(4, dtype="float32"))
    assert (module(noise()) - sample(student, noise(), 4)).abs().max() < 1e-5


@torch.no_grad()
def test_halving_goes_on_from_the_heads_of_its_times(tiny):
    two = fused(uneven(tiny("v")), 2)
    assert torch.allclose(first_heads(two, 1)(noise(), torch.ones(3)), two(noise(), torch.ones(3)))


def test_a_run_and_what_follows(run, workplace, smoke):
    """One stage, its students, sampling and evaluation of the one directory, and halving from its two steps."""
    teacher = f"teacher={smoke / 'teacher' / 'denoiser'}"
    small = ("experiment=smoke", "metrics.num_samples=50", "steps.updates=2", "steps.updates_last_two=2")
    options = (*small, "method=parallel_decoding", "steps.plan=[8,4,2,1]", "name=parallel")
    status, _, err = run("distill.py", *options, teacher, f"start={smoke / 'steps-0001' / 'denoiser'}")
    assert status == 0, err
    directory = workplace / "outputs/parallel"
    rows = {row["stage"]: row for row in json.loads((directory / "summary.json").read_text())}
    assert list(rows) == ["teacher", "parallel-0008", "steps-0004", "steps-0002", "steps-0001"]
    assert rows["parallel-0008"]["updates"] == 6 and rows["steps-0001"]["parent"] == "parallel-0008"
    assert rows["parallel-0008"]["fid_classifier"] == pytest.approx(rows["steps-0004"]["fid_classifier"], rel=1e-4)
    started = load_file(smoke / "steps-0001/denoiser/unet/diffusion_pytorch_model.safetensors")
    ended = load_file(directory / "parallel-0008/denoiser/unet/diffusion_pytorch_model.safetensors")
    assert ended["conv_out.weight"].shape[0] == 8 * started["conv_out.weight"].shape[0]
    key = "mid_block.resnets.0.conv1.weight"
    assert (ended[key] - started[key]).abs().max() < 5e-3  # two updates away, where the teacher's is far
    everything = f"denoiser={directory}/parallel-0008/denoiser"
    status, _, err = run("sample.py", everything, "num_steps=2", "num_images=4")
    assert status == 0, err
    status, _, err = run("evaluate.py", everything, *small[1:2], "name=parallel_all")
    assert status == 0, err
    measured = json.loads((workplace / "outputs/evaluations/parallel_all.json").read_text())
    assert {row["provenance"]["num_steps"] for row in measured} >= {4, 2, 1}
    status, _, err = run(
        "distill.py", *small, f"teacher={directory}/parallel-0008/denoiser", "steps.plan=[2,1]", "name=from_two"
    )
    assert status == 0, err
    one = Denoiser.load(workplace / "outputs/from_two/steps-0001/denoiser")
    assert one.parameterization.name == "x" and one.lineage[-3:] == ["parallel-0008", 2, 1]


def test_bad_input(told, tmp_path, tiny, smoke):
    student = uneven(tiny("x"))
    student.num_steps = 4
    student.save(tmp_path / "all")
    parallel = ("distill.py", "experiment=smoke", "name=refused", "method=parallel_decoding")
    for command, words in (
        ((*parallel, "steps.plan=[8,3,1]"), "the first entry is the grid, which each of the others must divide"),
        ((*parallel, "steps.plan=[8,2,4]"), "in falling order"),
        ((*parallel, "steps.plan=[8,4]", "method.last=2"), "method.last=2 must be a share"),
        ((*parallel, "steps.plan=[8,4]", "method.mean=eps"), "method.mean=eps must be x or velocity"),
        (("sample.py", f"denoiser={tmp_path}/all", "num_steps=3"), "knows 4, 2, 1 steps, not 3"),
        (("evaluate.py", f"denoiser={tmp_path}/all", "num_steps=[2,3]", "name=no"), "knows 4, 2, 1 steps, not 3"),
    ):
        status, err = told(*command)
        assert status == 2 and words in err and err.count("\n") == 1, err
    with pytest.raises(UserError, match="not known to end in one convolution"):
        other = Denoiser(torch.nn.Identity(), student.parameterization.inner, CosineSchedule(), image_shape=(1, 8, 8))
        grown(other, 8, (4,))
    with pytest.raises(UserError, match="must divide"):
        ParallelDecoding().stages(Steps([8, 8, 1]))
    again = copy.deepcopy(student)
    with pytest.raises(UserError, match=r"start steps\.plan at 8"):
        grown(again, 16, (4,))


def test_of_its_steps_a_part_is_timed_where_a_machine_is_slow(tiny, monkeypatch):
    monkeypatch.setattr(timing, "BUDGET", 0.0)
    (row,) = timing.time_stages([grown(tiny(), 8, (4, 2))], [4], torch.device("cpu"))  # in one step it cannot be drawn
    assert row["timed_steps"] == 1 and row["seconds_per_image"] > 0
