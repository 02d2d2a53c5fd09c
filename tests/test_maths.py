"""Identities of the diffusion maths, and a Gaussian whose optimal denoiser is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdistill import weighting
from pdistill.interop.schedulers import SCHEDULERS
from pdistill.training.distillation import distillation_target
from pdistill.parameterization import Eps, V, X, XEps, broadcast, x_to_eps, x_to_v
from pdistill.sampling import ddim_step, sample
from pdistill.schedule import CosineSchedule, alpha_sigma
from pdistill.steps import stages
from pdistill.training.module import weighted_loss

SHAPE = (3, 2, 4, 4)
times = st.floats(0.02, 0.98)
seeds = st.integers(0, 2**31)


def noise(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Gaussian:
    """E[x | z_t] for x ~ N(mean, std^2) per pixel: mean + alpha std^2 / (alpha^2 std^2 + sigma^2) (z - alpha mean)."""

    schedule = CosineSchedule()

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mean = torch.randn(SHAPE[1:], generator=generator, dtype=torch.float64)
        self.std = torch.rand(SHAPE[1:], generator=generator, dtype=torch.float64) + 0.2

    def __call__(self, z, t, label=None):
        alpha, sigma = (broadcast(a, z) for a in alpha_sigma(self.schedule(t)))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (z - alpha * self.mean)


class PerfectStudent:
    """Predicts the distillation target exactly."""

    def __init__(self, teacher, num_steps: int, teacher_steps: int = 2) -> None:
        self.teacher, self.num_steps, self.teacher_steps = teacher, num_steps, teacher_steps
        self.schedule = teacher.schedule

    def __call__(self, z, t, label=None):
        return distillation_target(self.teacher, z, t, self.num_steps, label, self.teacher_steps)


@given(seeds, times)
@settings(deadline=None)
def test_conversions_invert_each_other(seed, t):
    x, z = noise(seed), noise(seed + 1)
    alpha, sigma = alpha_sigma(CosineSchedule()(torch.tensor(t, dtype=torch.float64)))
    eps, v = x_to_eps(x, z, alpha, sigma), x_to_v(x, z, alpha, sigma)
    both = torch.cat([x, eps], dim=1)
    for parameterization, output in ((X(), x), (V(), v), (Eps(), eps), (XEps(), both)):
        torch.testing.assert_close(parameterization.to_x(output, z, alpha, sigma), x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(v, alpha * eps - sigma * x, rtol=1e-8, atol=1e-8)


@given(st.floats(0, 1), st.floats(0, 1))
def test_schedule_falls_and_preserves_variance(t, s):
    schedule = CosineSchedule()
    t, s = torch.tensor([max(t, s), min(t, s)], dtype=torch.float64)
    assert schedule(t) <= schedule(s)
    alpha, sigma = alpha_sigma(schedule(t))
    assert math.isclose(alpha**2 + sigma**2, 1, rel_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedule_ends(dtype):
    ends = torch.tensor([0, 1], dtype=dtype)
    torch.testing.assert_close(CosineSchedule()(ends), torch.tensor([20, -20], dtype=dtype))
    zero = CosineSchedule(logsnr_min=-math.inf)(ends)
    assert zero[1] == -math.inf
    alpha, sigma = alpha_sigma(zero)
    assert (alpha[1], sigma[1]) == (0, 1)


@pytest.mark.parametrize("name", ["x", "x_eps", "v"])
@pytest.mark.parametrize("weight", ["snr", "truncated_snr", "snr_plus_one", "constant"])
def test_zero_terminal_snr_gives_finite_losses_and_gradients(tiny, name, weight):
    teacher, student = tiny(name), tiny(name, seed=1)
    teacher.schedule = student.schedule = CosineSchedule(logsnr_min=-math.inf)
    z, t = torch.randn(4, 1, 8, 8), torch.tensor([1.0, 0.75, 0.5, 0.25])
    target = distillation_target(teacher, z, t, 4).detach()
    losses = weighted_loss(getattr(weighting, weight), student(z, t), target, student.schedule(t))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@given(seeds, st.sampled_from([(4, 2), (2, 4), (1, 8), (1, 2), (3, 5)]))
@settings(deadline=None)
def test_a_perfect_student_lands_where_its_teacher_does(seed, steps):
    num_steps, teacher_steps = steps
    teacher = Gaussian()
    student = PerfectStudent(teacher, num_steps, teacher_steps)
    ours = sample(student, noise(seed), num_steps, clip=False)
    theirs = sample(teacher, noise(seed), num_steps * teacher_steps, clip=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_one_student_step_is_the_teachers_two():
    """Not only at the end of sampling: at every t, against two explicit DDIM steps."""
    teacher, num_steps, z = Gaussian(), 4, noise(3)
    for i in (2, 3, 4):
        t, m, s = (torch.full((3,), k / (2 * num_steps), dtype=torch.float64) for k in (2 * i, 2 * i - 1, 2 * i - 2))
        logsnr_t, logsnr_m, logsnr_s = (teacher.schedule(u) for u in (t, m, s))
        z_m = ddim_step(z, teacher(z, t), logsnr_t, logsnr_m)
        z_s = ddim_step(z_m, teacher(z_m, m), logsnr_m, logsnr_s)
        target = distillation_target(teacher, z, t, num_steps)
        torch.testing.assert_close(ddim_step(z, target, logsnr_t, logsnr_s), z_s, rtol=1e-10, atol=1e-10)


@given(seeds, st.integers(1, 64), st.integers(2, 5))
@settings(deadline=None)
def test_a_one_step_teacher_is_its_own_target(seed, num_steps, teacher_steps):
    x = noise(seed)
    teacher = Gaussian()
    one_step = type("OneStep", (), {"schedule": teacher.schedule, "__call__": lambda self, z, t, label: x})()
    t = torch.tensor([1, (num_steps + 1) // 2 / num_steps, 1 / num_steps], dtype=torch.float64)
    target = distillation_target(one_step, noise(seed + 1), t, num_steps, None, teacher_steps)
    torch.testing.assert_close(target, x, rtol=1e-9, atol=1e-9)


def test_ddim_of_the_optimal_denoiser_has_the_datas_moments_and_its_student_keeps_them():
    """DDIM is affine here, x = scale z + shift, so two inputs give the mean and the covariance exactly."""
    gaussian = Gaussian()

    def moments(denoiser, num_steps):
        shift, end = (
            sample(denoiser, z.expand(SHAPE), num_steps, clip=False)[0]
            for z in torch.tensor([0.0, 1.0]).double()[:, None, None, None, None]
        )
        return shift, end - shift

    mean, std = moments(gaussian, 2048)
    torch.testing.assert_close(mean, gaussian.mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(std, gaussian.std, rtol=5e-3, atol=0)
    student = PerfectStudent(PerfectStudent(PerfectStudent(gaussian, 4), 2), 1)
    for ours, theirs in zip(moments(student, 1), moments(gaussian, 8), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_weightings_are_errors_in_other_quantities(tiny):
    """SNR, SNR + 1 and the truncated SNR times the error in x are the errors in eps, in v, and the larger."""
    logsnr = torch.linspace(-8, 8, 3, dtype=torch.float64)
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(logsnr))
    z, x, y = noise(0), noise(1), noise(2)
    error = {
        name: (f(x, z, alpha, sigma) - f(y, z, alpha, sigma)).square().mean((1, 2, 3))
        for name, f in {"x": lambda x, *_: x, "eps": x_to_eps, "v": x_to_v}.items()
    }
    expected = {
        weighting.constant: error["x"],
        weighting.snr: error["eps"],
        weighting.snr_plus_one: error["v"],
        weighting.truncated_snr: torch.maximum(error["x"], error["eps"]),
    }
    for weight, value in expected.items():
        torch.testing.assert_close(weighted_loss(weight, x, y, logsnr), value)


def test_who_teaches_whom():
    plan = [256, 32, 8, 4, 2, 1]
    papers, further = stages(plan, 1, 1), stages(plan, 1, 1, max_teacher_steps=4)
    assert [(s.teacher, s.teacher_steps) for s in papers] == [(0, 8), (1, 4), (2, 2), (3, 2), (4, 2)]
    assert [(s.teacher, s.teacher_steps) for s in further] == [(0, 8), (1, 4), (2, 2), (2, 4), (3, 4)]


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"sampler": "euler"}, {"variance": 1.5}, {"variance": "huge"}])
def test_sampler_refuses(tiny, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sample(tiny(), torch.zeros(1, 1, 8, 8), **({"num_steps": 2} | wrong))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_diffusers_solve_the_same_equation(name):
    """Nearer to the limit of many DDIM steps than DDIM is with as many evaluations."""
    gaussian, z = Gaussian(), noise(64)
    calls = []

    def counted(*args):
        calls.append(args)
        return gaussian(*args)

    counted.schedule = gaussian.schedule
    limit = sample(gaussian, z, 2048, clip=False)
    # Heun's takes two evaluations a step but for the last, and begins with long steps.
    evaluations, share, made = (64, 1.0, 63) if name == "heun" else (16, 0.5, 16)
    error = {s: (sample(counted, z, evaluations, sampler=s, clip=False) - limit).abs().max() for s in ("ddim", name)}
    assert error[name] < share * error["ddim"]
    assert len(calls) == evaluations + made
    for num_steps in (1, 2, 3):
        assert sample(gaussian, z, num_steps, sampler=name).isfinite().all()
