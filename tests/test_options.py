"""What every method shares: EMAs, learning rates and losses of students, and better steps of their teachers."""

import json
import math
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_benchmarks import benchmark
from test_chain import hashes
from test_maths import PROCESSES, SCHEDULES, Gaussian, noise
from test_training import STAGE, new_denoiser, stopped, train, weights

from pdistill import weighting
from pdistill.errors import UserError
from pdistill.method.halving import Halving
from pdistill.optimizer import annealing, constant_then_linear, linear_to_zero
from pdistill.parameterization import broadcast
from pdistill.sampling import ddim_step, sample
from pdistill.target import analytic_variance, distillation_target, measured_variance, with_variance
from pdistill.training.distillation import DistillationModule
from pdistill.training.module import Recipe
from pdistill.training.settings import LOSSES, Distillation, Training
from pdistill.training.teacher import TeacherModule
from pdistill.weighting import DISTANCES, snr_plus_one, weighted_loss, with_loss

ode = benchmark("exact_ode")


@pytest.mark.parametrize(("name", "times_nearer"), [("40 modes", 5), ("10 narrow modes", 1)])
def test_a_second_order_target_is_nearer_to_the_exact_ode(name, times_nearer):
    """64 steps in blocks of 8, by a student that makes no error, from the same noise; the median over samples."""
    mixture = ode.Mixture(*ode.MIXTURES[name])
    z = mixture.noise(64)
    exact = mixture.exact(z)

    def distance(denoiser, num_steps: int) -> float:
        return float(ode.rms(sample(denoiser, z, num_steps, clip=False) - exact).median())

    ddim = distance(mixture, 64)
    assert distance(mixture, 256) < ddim / 3  # it is of first order, as it must be if the reference is right
    assert distance(ode.Taught(mixture, 8, 8, order=2), 8) < ddim / times_nearer
    assert distance(ode.Taught(mixture, 32, 2, variance=analytic_variance), 32) < ddim


@pytest.mark.parametrize("name", ["cosine", "edm"])
def test_a_block_of_second_order_is_the_samplers_of_diffusers(name):
    """DPM-Solver++(2M), from noise to data in one block of 8, against diffusers' own, which knows no zero SNR."""
    teacher = Gaussian(SCHEDULES[name])
    z, t = noise(3) * teacher.schedule.noise_scale, torch.ones(3, dtype=torch.float64)
    ours = distillation_target(teacher, z, t, 1, None, 8, order=2)
    theirs = sample(teacher, noise(3), 8, sampler="dpmsolver++2m", clip=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - distillation_target(teacher, z, t, 1, None, 8)).abs().max() > 1e-3


@PROCESSES
@given(seed=st.integers(0, 2**31), i=st.integers(1, 4), teacher_steps=st.integers(1, 5))
@settings(deadline=None, max_examples=20)
def test_teachers_steps_of_every_kind(schedule, seed, i, teacher_steps):
    """At every time: finite, DDIM's where they must be, and for a teacher that always says the same its word."""
    teacher, z, t = Gaussian(schedule), noise(seed), torch.full((3,), i / 4, dtype=torch.float64)
    arguments = (teacher, z, t, 4, None, teacher_steps)
    plain, second = (distillation_target(*arguments, order=order) for order in (1, 2))
    assert torch.equal(plain, distillation_target(*arguments))
    nothing = distillation_target(*arguments, variance=lambda x_hat, logsnr: torch.zeros(3))
    torch.testing.assert_close(nothing, plain)
    some = distillation_target(*arguments, variance=measured_variance(noise(seed + 1)))
    assert second.isfinite().all() and some.isfinite().all()
    if teacher_steps == 1:
        assert torch.equal(second, plain)
        if i == 1:  # to clean data
            assert torch.equal(some, plain)
    if teacher_steps == 2 and (i == 1 or (i == 4 and schedule(t)[0] == -math.inf)):  # a step infinitely long
        assert torch.equal(second, plain)
    word = noise(seed + 2)
    constant = type("Constant", (), {"schedule": schedule, "__call__": lambda self, z, t, condition: word})()
    torch.testing.assert_close(distillation_target(constant, *arguments[1:], order=2), word)


@PROCESSES
@given(seed=st.integers(0, 2**31), t=st.floats(0.05, 1), share=st.floats(0.1, 0.95), v=st.floats(0, 2))
@settings(deadline=None, max_examples=30)
def test_addim_is_a_ddim_step_of_another_x(schedule, seed, t, share, v):
    x_hat, z_t = noise(seed), noise(seed + 1)
    v = torch.tensor([v, v / 2, 0.0], dtype=torch.float64)
    logsnrs = tuple(schedule(torch.full((3,), u, dtype=torch.float64)) for u in (t, t * share))
    (alpha, sigma), (alpha_s, sigma_s) = (schedule.alpha_sigma(logsnr) for logsnr in logsnrs)
    eps_hat = (z_t - broadcast(alpha, z_t) * x_hat) / broadcast(sigma, z_t)
    g = alpha_s - sigma_s / sigma * alpha
    length = (sigma_s**2 + g**2 * v * 32 / eps_hat.square().sum((1, 2, 3))).sqrt()
    z_s = broadcast(alpha_s, z_t) * x_hat + broadcast(length, z_t) * eps_hat
    ours = ddim_step(z_t, with_variance(x_hat, z_t, logsnrs, v, schedule.alpha_sigma), *logsnrs, schedule.alpha_sigma)
    torch.testing.assert_close(ours, z_s, rtol=1e-7, atol=1e-8)


def test_halving_asks_for_better_steps_of_the_first_teacher_alone(tiny):
    teacher, student = tiny(), tiny(seed=1)
    x = torch.rand(6, 1, 8, 8) * 2 - 1

    def losses(**options) -> torch.Tensor:
        torch.manual_seed(0)
        return Halving(**options).losses(student, teacher, STAGE, snr_plus_one, x, None)[0].detach()

    kinds = ({}, {"teacher_order": 2}, {"addim": True}, {"addim": "measured"})
    values = [losses(**kind) for kind in kinds]
    assert not any(torch.allclose(a, b) for k, a in enumerate(values) for b in values[:k])
    teacher.num_steps = 8
    assert all(torch.equal(losses(**kind), values[0]) for kind in kinds)
    Halving().check(teacher)
    for kind in kinds[1:]:
        with pytest.raises(UserError, match="this one was distilled for 8 steps"):
            Halving(**kind).check(teacher)


# ---- losses, learning rates, EMAs


@given(seed=st.integers(0, 2**31), size=st.floats(1e-6, 1e3))
@settings(deadline=None, max_examples=30)
def test_distances(seed, size):
    """Of one difference: l2 is the root of the squared one, pseudo-Huber between that and a parabola."""
    x, logsnr = noise(seed), torch.tensor([-3.0, 0, 2]).double()
    x_hat = (x + size * noise(seed + 1)).requires_grad_()
    assert tuple(DISTANCES) == LOSSES
    losses = {loss: weighted_loss(with_loss(snr_plus_one, loss), x_hat, x, logsnr) for loss in LOSSES}
    weight = snr_plus_one(logsnr)
    assert torch.equal(losses["squared"], weight * (x_hat - x).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(losses["l2"], weight * (32 * losses["squared"] / weight).sqrt())
    c = 0.00054 * math.sqrt(32)
    error = 32 * losses["squared"] / weight
    torch.testing.assert_close(losses["pseudo_huber"], weight * ((error + c**2).sqrt() - c), rtol=1e-5, atol=1e-12)
    wide = weighted_loss(with_loss(snr_plus_one, "pseudo_huber", 1e6), x_hat, x, logsnr)
    torch.testing.assert_close(wide, weight * error / 2e6, rtol=1e-2, atol=0)
    for loss in LOSSES:
        at_the_target = x.clone().requires_grad_()
        weighted_loss(with_loss(snr_plus_one, loss), at_the_target, x, logsnr).sum().backward()
        assert at_the_target.grad is not None and (at_the_target.grad == 0).all(), loss
    assert with_loss(weighting.snr, "squared") is weighting.snr  # golden parity


def test_the_rate_stays_and_falls_at_the_end():
    late = constant_then_linear(10, 0.3)
    assert [late(k) for k in (0, 6, 7)] == [1, 1, 1] and late(8) == pytest.approx(2 / 3) and late(10) == late(11) == 0
    assert [constant_then_linear(10, 0)(k) for k in (0, 9, 10)] == [1, 1, 1]
    for k in range(12):
        assert constant_then_linear(10, 1)(k) == pytest.approx(linear_to_zero(10)(k))
        assert annealing(Distillation(), 10)(k) == linear_to_zero(10)(k)
        assert annealing(Distillation(learning_rate_schedule="constant"), 10)(k) == late(k)


def students(**options):
    """A student's module, anew each time."""
    return DistillationModule(new_denoiser(), STAGE, Recipe(Distillation(batch_size=12, **options), snr_plus_one))


class Score:
    """A metric that likes the second EMA best, or as much as the first."""

    name = "fid_fake"

    def __init__(self, *values: float) -> None:
        self.values, self.asked = values, []

    def measure(self, denoiser, num_steps, device) -> float:
        assert not denoiser.training
        self.asked.append(num_steps)
        return self.values[len(self.asked) - 1]


def test_a_decay_of_auto_follows_from_the_updates():
    """A thousandth of what the training started from is left: TRACT's rule."""
    assert students(ema_decay="auto").decays == students(ema_decays=["auto"]).decays == [0.001 ** (1 / STAGE.updates)]
    assert students(ema_decay=0.9).decays == [0.9] and students().decays == []
    teacher = TeacherModule(new_denoiser(), Recipe(Training(updates=200, ema_decay="auto"), snr_plus_one))
    assert teacher.decays[0] ** 200 == pytest.approx(1e-3)
    module = students(ema_decay="auto")
    module.on_fit_start()
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.zero_()
    for _ in range(STAGE.updates):
        for average in module.averages:
            average(None)
    started, ended = (d.network.conv_in.weight for d in (new_denoiser(), module.result))
    torch.testing.assert_close(ended, started / 1000)


def test_several_emas_are_those_of_runs_with_one_each_and_the_best_is_kept(tmp_path, capsys):
    for decay in (0.0, 0.5, "auto"):
        train(students(ema_decay=decay), tmp_path / str(decay))
    train(students(), tmp_path / "none")
    assert weights(tmp_path / "none") == weights(tmp_path / "0.0")  # that of decay 0 is the weights themselves
    for kept, values in (("0.5", (3.0, 2.0, 2.5)), ("auto", (3.0, 2.0, 1.0)), ("0.0", (2.0, 2.0, 2.0))):
        score, directory = Score(*values), tmp_path / f"best-{kept}"
        several = {"ema_decays": [0.0, 0.5, "auto"]}
        stopped(students(**several), directory, 4, metric=score)
        assert not score.asked
        train(students(**several), directory, metric=score)
        assert weights(directory) == weights(tmp_path / kept) and score.asked == [4, 4, 4]
        auto = 0.001 ** (1 / 6)
        told = json.loads((directory / "ema.json").read_text())
        assert told["ema_decay"] == {"0.5": 0.5, "auto": auto, "0.0": 0.0}[kept]
        candidates = zip((0.0, 0.5, auto), values, strict=True)
        assert told["ema_candidates"] == [{"ema_decay": d, "fid_fake": v} for d, v in candidates]
        assert f"the EMA of decay {told['ema_decay']:g} is kept (fid_fake by decay: 0: " in capsys.readouterr().out
    with pytest.raises(UserError, match="metrics=none measures nothing"):
        train(students(**several), tmp_path / "unmeasured")
    assert not (tmp_path / "unmeasured").exists()


QUICK = ["training.updates=20", "steps.plan=[8,2,1]", "steps.updates=12", "steps.updates_last_two=12"]
OPTIONS = ["distillation.ema_decays=[0.5,auto]", "distillation.loss=pseudo_huber", "method.teacher_order=2"]
OPTIONS += ["distillation.learning_rate_schedule=constant", "training.ema_decay=auto", "metrics.num_samples=100"]
OPTIONS += ["checkpoint_every_n_updates=3"]


@pytest.mark.slow
def test_a_run_with_options_ends_byte_identical(start, run, workplace):
    """Killed in its first stage; the chosen EMA starts and teaches the next one."""
    command = ("distill.py", "experiment=smoke", *QUICK, *OPTIONS)
    status, _, err = run(*command, "name=options")
    assert status == 0, err
    whole, killed = (workplace / "outputs" / name for name in ("options", "killed"))
    process, deadline = start(*command, "name=killed"), time.monotonic() + 60
    while not (killed / "steps-0002" / "last.ckpt").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (killed / "steps-0002" / "denoiser").exists()
    status, out, err = run(*command, "name=killed")
    assert status == 0, err
    assert hashes(whole) == hashes(killed)
    _, *rows = json.loads((whole / "summary.json").read_text())
    for row in rows:
        candidates = {c["ema_decay"]: c["fid_classifier"] for c in row["ema_candidates"]}
        assert list(candidates) == [0.5, 0.001 ** (1 / 12)]
        assert row["fid_classifier"] == candidates[row["ema_decay"]] == min(candidates.values())
        assert f"the EMA of decay {row['ema_decay']:g} is kept" in out


BAD = [
    ("distill.py distillation.ema_decay=often", ["distillation.ema_decay=often", "or null"]),
    ("train.py training.ema_decay=true", ["training.ema_decay=True", "auto, which is 0.001^(1/updates)"]),
    ("distill.py conversion.ema_decay=1", ["conversion.ema_decay=1", "[0, 1)"]),
    ("distill.py distillation.ema_decays=auto", ["distillation.ema_decays=auto must be a list", "[0.99,auto]"]),
    ("distill.py distillation.ema_decays=[]", ["must be a list of different decays"]),
    ("distill.py distillation.ema_decays=[0.9,0.9]", ["must be a list of different decays"]),
    ("distill.py distillation.ema_decays=[0.9,2]", ["distillation.ema_decays=2 must be a number", "auto"]),
    ("distill.py distillation.ema_decays=[0.9] distillation.ema_decay=auto", ["give one of them"]),
    ("distill.py distillation.ema_decays=[0.9,auto] metrics=none", ["metrics=none measures nothing"]),
    ("distill.py distillation.learning_rate_schedule=cosine", ["must be one of linear, constant"]),
    ("distill.py distillation.final_decay=1.5", ["distillation.final_decay=1.5", "0 to 1"]),
    ("distill.py distillation.loss=l1", ["distillation.loss=l1 must be one of squared, l2, pseudo_huber"]),
    ("distill.py distillation.huber_c=0.1", ["distillation.huber_c=0.1", "distillation.loss=pseudo_huber"]),
    ("distill.py distillation.loss=pseudo_huber distillation.huber_c=0", ["distillation.huber_c=0.0", "above 0"]),
    ("distill.py method.teacher_order=3", ["method.teacher_order=3 must be 1, for DDIM, or 2"]),
    ("distill.py method.addim=perhaps", ["method.addim=perhaps must be false, true or measured"]),
    ("distill.py method.addim=true method.teacher_order=2", ["the same error", "give one"]),
    ("distill.py method.teacher_order=2 teacher=student-of-4 steps.plan=[4,2]", ["4 steps", "knows every time"]),
]


@pytest.mark.parametrize(("command", "words"), BAD, ids=[command for command, _ in BAD])
def test_one_line_before_work_starts(told, workplace, command, words):
    student = new_denoiser()
    student.num_steps = 4
    student.save(workplace / "student-of-4")
    before = set(workplace.glob("outputs/*"))
    status, err = told(*command.split(" "))
    assert status == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert set(workplace.glob("outputs/*")) == before
