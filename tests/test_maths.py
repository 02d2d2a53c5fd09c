"""Identities of the diffusion maths under three processes, and a Gaussian whose optimal denoiser is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdistill import weighting
from pdistill.errors import UserError
from pdistill.generation import Draw, generate
from pdistill.parameterization import Edm, Eps, Flow, V, X, XEps, broadcast, x_to_eps, x_to_v
from pdistill.sampling import ddim_step, posterior, sample, samplers
from pdistill.schedule import CosineSchedule, EdmSchedule, FlowSchedule, logsnr_on_grid
from pdistill.steps import stages
from pdistill.target import distillation_target
from pdistill.training.module import weighted_loss

SHAPE = (3, 2, 4, 4)
SCHEDULES = {
    "cosine": CosineSchedule(),
    "zero": CosineSchedule(logsnr_min=-math.inf),
    "flow": FlowSchedule(),
    "shifted": FlowSchedule(shift=3.0),
    "edm": EdmSchedule(),
}
PROCESSES = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
times = st.floats(0.02, 0.98)
seeds = st.integers(0, 2**31)


def noise(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Gaussian:
    """E[x | z_t] for x ~ N(mean, std^2) per pixel: mean + alpha std^2 / (alpha^2 std^2 + sigma^2) (z - alpha mean)."""

    def __init__(self, schedule=SCHEDULES["cosine"]) -> None:
        self.schedule = schedule
        generator = torch.Generator().manual_seed(0)
        self.mean = torch.randn(SHAPE[1:], generator=generator, dtype=torch.float64)
        self.std = torch.rand(SHAPE[1:], generator=generator, dtype=torch.float64) + 0.2

    def __call__(self, z, t, condition=None):
        alpha, sigma = (broadcast(a, z) for a in self.schedule.alpha_sigma(self.schedule(t)))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (z - alpha * self.mean)


class PerfectStudent:
    """Predicts the distillation target exactly."""

    def __init__(self, teacher, num_steps: int, teacher_steps: int = 2) -> None:
        self.teacher, self.num_steps, self.teacher_steps = teacher, num_steps, teacher_steps
        self.schedule = teacher.schedule

    def __call__(self, z, t, condition=None):
        return distillation_target(self.teacher, z, t, self.num_steps, condition, self.teacher_steps)


@PROCESSES
@given(seed=seeds, t=times)
@settings(deadline=None, max_examples=30)
def test_conversions_invert_each_other(schedule, seed, t):
    x, z = noise(seed), noise(seed + 1)
    alpha, sigma = schedule.alpha_sigma(schedule(torch.tensor(t, dtype=torch.float64)))
    eps, v = x_to_eps(x, z, alpha, sigma), x_to_v(x, z, alpha, sigma)
    edm, d = Edm(), alpha**2 / 4 + sigma**2  # sigma_data = 1/2
    outputs = {
        X(): x,
        V(): v,
        Eps(): eps,
        XEps(): torch.cat([x, eps], dim=1),
        Flow(): eps - x,
        edm: (x - alpha / 4 / d * z) / (sigma / 2 * d.rsqrt()),
    }
    for parameterization, output in outputs.items():
        torch.testing.assert_close(parameterization.to_x(output, z, alpha, sigma), x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(v, alpha * eps - sigma * x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(edm.scale_input(alpha * x + sigma * eps, alpha, sigma), z * d.rsqrt())


def test_edm_is_v_with_another_sign_at_unit_data():
    """F = -v at sigma_data = 1 under variance preserving, whose input it leaves alone."""
    z, output = noise(0), noise(1)
    alpha, sigma = (
        a[:, None, None, None] for a in SCHEDULES["cosine"].alpha_sigma(torch.tensor([-3.0, 0, 4]).double())
    )
    torch.testing.assert_close(Edm(1.0).to_x(-output, z, alpha, sigma), V().to_x(output, z, alpha, sigma))
    torch.testing.assert_close(Edm(1.0).scale_input(z, alpha, sigma), z)


@PROCESSES
@given(t=st.floats(0, 1), s=st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_schedules_fall_and_keep_to_their_process(schedule, t, s):
    t, s = torch.tensor([max(t, s), min(t, s)], dtype=torch.float64)
    assert schedule(t) <= schedule(s) + 1e-9
    alpha, sigma = schedule.alpha_sigma(schedule(t))
    kept = {CosineSchedule: alpha**2 + sigma**2, FlowSchedule: alpha + sigma, EdmSchedule: alpha}[type(schedule)]
    assert math.isclose(kept, 1, rel_tol=1e-12)
    if schedule(t) > -math.inf:
        assert math.isclose(torch.log(alpha**2 / sigma**2), schedule(t), rel_tol=1e-9, abs_tol=1e-9)
    assert 0 <= schedule.timestep(t) <= 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedule_ends(dtype):
    ends = torch.tensor([0, 1], dtype=dtype)
    torch.testing.assert_close(CosineSchedule()(ends), torch.tensor([20, -20], dtype=dtype))
    for schedule in (SCHEDULES["zero"], SCHEDULES["flow"], SCHEDULES["shifted"]):
        assert schedule(ends)[1] == -math.inf and schedule(ends)[0] == pytest.approx(20)
        alpha, sigma = schedule.alpha_sigma(schedule(ends))
        assert (alpha[1], sigma[1]) == (0, 1) and schedule.timestep(ends)[1] == pytest.approx(1000)
    alpha, sigma = SCHEDULES["edm"].alpha_sigma(SCHEDULES["edm"](ends))
    torch.testing.assert_close(sigma, torch.tensor([0.002, 80], dtype=dtype), rtol=1e-4, atol=0)
    assert SCHEDULES["edm"].noise_scale == 80
    for wrong in ({"sigma_max": math.inf}, {"sigma_min": 0.0}):
        with pytest.raises(ValueError, match="no zero terminal SNR"):
            EdmSchedule(**wrong)


def test_times_that_edm_trains_on_are_log_normal():
    schedule = EdmSchedule()
    t = schedule.training_time(torch.rand(50_000, generator=torch.Generator().manual_seed(0)))
    logs = schedule.alpha_sigma(schedule(t.double()))[1].log()
    assert logs.mean() == pytest.approx(-1.2, abs=0.02) and logs.std() == pytest.approx(1.2, abs=0.02)
    assert schedule.training_time(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("name", ["x", "x_eps", "v", "flow", "edm"])
@pytest.mark.parametrize(
    "schedule", [SCHEDULES["zero"], SCHEDULES["flow"], SCHEDULES["edm"]], ids=["zero", "flow", "edm"]
)
def test_the_end_of_every_process_gives_finite_losses_and_gradients(tiny, name, schedule):
    teacher, student = tiny(name), tiny(name, seed=1)
    teacher.schedule = student.schedule = schedule
    z, t = torch.randn(4, 1, 8, 8), torch.tensor([1.0, 0.75, 0.5, 0.25])
    target = distillation_target(teacher, z, t, 4).detach()
    for weight in ("snr", "truncated_snr", "snr_plus_one", "constant", "flow", "edm"):
        losses = weighted_loss(getattr(weighting, weight), student(z, t), target, schedule(t))
        student.zero_grad()
        losses.sum().backward()
        assert losses.isfinite().all(), weight
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@PROCESSES
@pytest.mark.parametrize("steps", [(4, 2), (2, 4), (1, 8), (1, 2), (3, 5)])
def test_a_perfect_student_lands_where_its_teacher_does(schedule, steps):
    num_steps, teacher_steps = steps
    teacher = Gaussian(schedule)
    student = PerfectStudent(teacher, num_steps, teacher_steps)
    ours = sample(student, noise(5), num_steps, clip=False)
    theirs = sample(teacher, noise(5), num_steps * teacher_steps, clip=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@PROCESSES
@pytest.mark.parametrize("teacher_steps", [2, 3, 8])
def test_one_student_step_is_the_teachers_steps(schedule, teacher_steps):
    """Not only at the end of sampling: at every t, against a composition step by step in float64."""
    teacher, num_steps, z = Gaussian(schedule), 4, noise(3)
    for i in (2, 3, 4):
        z_s = z
        for j in range(teacher_steps * i, teacher_steps * (i - 1), -1):
            t = torch.full((3,), j / (teacher_steps * num_steps), dtype=torch.float64)
            s = torch.full((3,), (j - 1) / (teacher_steps * num_steps), dtype=torch.float64)
            z_s = ddim_step(z_s, teacher(z_s, t), schedule(t), schedule(s), schedule.alpha_sigma)
        t, s = (torch.full((3,), k / num_steps, dtype=torch.float64) for k in (i, i - 1))
        target = distillation_target(teacher, z, t, num_steps, teacher_steps=teacher_steps)
        ours = ddim_step(z, target, schedule(t), schedule(s), schedule.alpha_sigma)
        torch.testing.assert_close(ours, z_s, rtol=1e-10, atol=1e-10)


@PROCESSES
@pytest.mark.parametrize("teacher_steps", [2, 5])
def test_the_target_is_a_convex_combination_of_the_same_weights(schedule, teacher_steps):
    """z cancels, a constant teacher is its own target, and at equal log-SNR all processes weigh alike."""
    t = torch.tensor([1, 5 / 8, 1 / 8], dtype=torch.float64)

    def weights(schedule) -> torch.Tensor:
        """(teacher_steps, 3): the target of a teacher that says 1 in its k-th evaluation and 0 in the others."""
        rows = []
        for k in range(teacher_steps):
            calls = iter(range(teacher_steps))
            spoken = type("Spoken", (), {"schedule": schedule})()
            teacher = lambda z, t, c, calls=calls, k=k: torch.full_like(z, float(next(calls) == k))  # noqa: E731
            spoken.__class__.__call__ = lambda self, z, t, c, teacher=teacher: teacher(z, t, c)
            rows.append(distillation_target(spoken, noise(k), t, 8, None, teacher_steps)[:, 0, 0, 0])
        return torch.stack(rows)

    ours = weights(schedule)
    torch.testing.assert_close(ours.sum(0), torch.ones(3, dtype=torch.float64))
    assert (ours >= -1e-12).all() and ours[-1, 2] == 1
    same_snr = type("Same", (CosineSchedule,), {"__call__": lambda self, t: schedule(t)})()
    torch.testing.assert_close(ours, weights(same_snr), rtol=1e-8, atol=1e-12)


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


@PROCESSES
def test_the_posterior_is_bayes_rule(schedule):
    """q(z_s | z_t, x) of the Gaussians q(z_s | x) and q(z_t | z_s), and its upper bound."""
    t, s = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    (a_t, s_t), (a_s, s_s) = (schedule.alpha_sigma(schedule(u)) for u in (t, s))
    z_t, x = noise(1), noise(2)
    ratio, between = a_t / a_s, s_t**2 - (a_t / a_s * s_s) ** 2  # q(z_t | z_s) = N(ratio z_s, between)
    precision = 1 / s_s**2 + ratio**2 / between
    mean, std = posterior(z_t, x, schedule.alpha_sigma, (schedule(t), schedule(s)), "small")
    torch.testing.assert_close(mean, (a_s * x / s_s**2 + ratio * z_t / between) / precision)
    torch.testing.assert_close(std.flatten(), precision**-0.5)
    large = posterior(z_t, x, schedule.alpha_sigma, (schedule(t), schedule(s)), "large")[1]
    torch.testing.assert_close(large.flatten(), between.sqrt())


def test_weightings_are_errors_in_other_quantities():
    """Each weighting times the error in x is the error in something: eps, v, the larger, the velocity, F."""
    logsnr = torch.linspace(-8, 8, 3, dtype=torch.float64)
    z, x, y = noise(0), noise(1), noise(2)

    def error(schedule, f) -> torch.Tensor:
        alpha, sigma = (a[:, None, None, None] for a in schedule.alpha_sigma(logsnr))
        return (f(x, alpha, sigma) - f(y, alpha, sigma)).square().mean((1, 2, 3))

    cosine, flow = SCHEDULES["cosine"], SCHEDULES["flow"]
    of_x, of_eps = error(cosine, lambda x, a, s: x), error(cosine, lambda x, a, s: x_to_eps(x, z, a, s))
    expected = {
        weighting.constant: of_x,
        weighting.snr: of_eps,
        weighting.snr_plus_one: error(cosine, lambda x, a, s: x_to_v(x, z, a, s)),
        weighting.truncated_snr: torch.maximum(of_x, of_eps),
        weighting.flow: error(flow, lambda x, a, s: x_to_eps(x, z, a, s) - x),
        # F = (x - c_skip z) / c_out, c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2) at alpha = 1
        weighting.edm: error(SCHEDULES["edm"], lambda x, a, s: x * (s**2 + 0.25).sqrt() / (s * 0.5)),
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


def test_samples_that_are_not_finite_are_refused(tiny):
    denoiser = tiny("v")
    denoiser.network.conv_out.bias.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        next(generate(denoiser, range(2), Draw(2)))


@PROCESSES
@pytest.mark.parametrize("name", [s for s in samplers() if s not in ("ddim", "ancestral", "stochastic")])
def test_schedulers_of_diffusers_solve_the_same_equation(name, schedule):
    """Nearer to the limit of many DDIM steps than DDIM is with as many evaluations; the callback sees them all."""
    gaussian, z = Gaussian(schedule), noise(64)
    calls, seen = [], []

    def counted(*args):
        calls.append(args)
        return gaussian(*args)

    counted.schedule = schedule
    limit = sample(gaussian, z, 2048, clip=False)
    # Heun's takes two evaluations a step but for the last, and begins with long steps.
    evaluations, share, made = (64, 1.0, 63) if name == "heun" else (16, 0.75, 16)
    error = {
        s: (sample(counted, z, evaluations, sampler=s, clip=False, callback=lambda *c: seen.append(c)) - limit)
        .abs()
        .max()
        for s in ("ddim", name)
    }
    assert len(calls) == len(seen) == evaluations + made
    if schedule in (
        SCHEDULES["edm"],
        SCHEDULES["shifted"],
    ):  # their grids do not suit the solvers, which do converge
        more = (sample(gaussian, z, 4 * evaluations, sampler=name, clip=False) - limit).abs().max()
        assert more < 0.5 * error[name]
    else:
        assert error[name] < share * error["ddim"]
    for num_steps in (1, 2, 3, 1500 if name != "heun" else 3):
        assert sample(gaussian, z, num_steps, sampler=name).isfinite().all()


def test_the_grid_ends_on_clean_data():
    for schedule in SCHEDULES.values():
        alpha, sigma = schedule.alpha_sigma(logsnr_on_grid(schedule, torch.arange(3).double(), 2))
        assert (alpha[0], sigma[0]) == (1, 0) and sigma[2] > alpha[2]
