"""Students for the stochastic sampler: its variances, their targets, and what becomes of them in every command."""

import hashlib
import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_maths import PROCESSES, SCHEDULES, SHAPE, Gaussian, noise, seeds
from test_students_out import BATCH, SEED, drawn, modules, same, student  # noqa: F401
from test_training import STAGE, new_denoiser, recipe

from pdistill import Denoiser, sample
from pdistill.commands import export, push, timing
from pdistill.commands.contenders import Contender, contenders, load
from pdistill.commands.settings import Evaluate
from pdistill.errors import UserError
from pdistill.method.halving import Halving
from pdistill.method.tract import Tract
from pdistill.parameterization import broadcast
from pdistill.sampling import ddim_step, sampler_of
from pdistill.schedule import FlowSchedule, logsnr_on_grid
from pdistill.steps import Stage
from pdistill.target import stochastic_route, x_along
from pdistill.training.distillation import DistillationModule
from pdistill.weighting import constant


class Jumps(Gaussian):
    """Of Gaussian data, the x whose DDIM step from i/N lands at max(i - 2, 0)/N where the exact ODE does."""

    def __init__(self, schedule, num_steps: int) -> None:
        super().__init__(schedule)
        self.steps, self.evaluations = num_steps, 0

    def marginal(self, i) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """alpha, sigma (B,) and the standard deviation (B, C, H, W) of z at i/N."""
        alpha, sigma = self.schedule.alpha_sigma(logsnr_on_grid(self.schedule, i.double(), self.steps))
        return (
            alpha,
            sigma,
            ((broadcast(alpha, self.std[None]) * self.std).square() + broadcast(sigma**2, self.std[None])).sqrt(),
        )

    def __call__(self, z, t, condition=None):
        self.evaluations += 1
        i = (t * self.steps).round()
        (a, s, std), (a_end, s_end, std_end) = self.marginal(i), self.marginal((i - 2).clamp(min=0))
        a, s, a_end, s_end = (broadcast(k, z) for k in (a, s, a_end, s_end))
        landed = a_end * self.mean + std_end / std * (z - a * self.mean)
        return (landed - s_end / s * z) / (a_end - s_end / s * a)


@PROCESSES
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_the_variance_is_right_at_every_step(schedule, num_steps):
    """The sampler is affine in all of its noises: its responses to each of them add up to the variance."""
    denoiser, responses = Jumps(schedule, num_steps), {}

    def states(of: int | None) -> dict[int, torch.Tensor]:
        """z at N/N, ..., 1/N and, at 0, the images, where the noise for time `of` is 1 and the others are 0."""
        seen = {}
        ones = {i: torch.full(SHAPE, float(i == of), dtype=torch.float64) for i in range(num_steps + 1)}
        arguments = {"sampler": "stochastic", "clip": False, "callback": lambda i, z, x_hat: seen.update({i: z})}
        seen[0] = sample(denoiser, ones[num_steps], num_steps, step_noise=ones, **arguments)
        return seen

    still = states(None)
    assert denoiser.evaluations == num_steps and list(still) == [*range(num_steps, 0, -1), 0]
    responses = {i: states(i) for i in range(1, num_steps + 1)}
    for i, shift in still.items():
        alpha, _, std = denoiser.marginal(torch.tensor([float(i)]))
        # z_1 starts as unit noise, a little off the marginal where some signal is left
        first = denoiser.marginal(torch.tensor([float(num_steps)]))[2] / schedule.noise_scale
        variance = sum((r[i] - shift) ** 2 * (first**2 if of == num_steps else 1) for of, r in responses.items())
        torch.testing.assert_close(variance, (std**2).expand(SHAPE), rtol=1e-8, atol=1e-10)
        if schedule is SCHEDULES["zero"]:
            torch.testing.assert_close(shift, (alpha * denoiser.mean).expand(SHAPE), rtol=1e-8, atol=1e-10)


class Learnt:
    """A student of the stochastic sampler that predicts its target exactly."""

    def __init__(self, teacher, num_steps: int, teacher_steps: int) -> None:
        self.teacher, self.num_steps, self.teacher_steps = teacher, num_steps, teacher_steps
        self.schedule, self.evaluations = teacher.schedule, 0

    def __call__(self, z, t, condition=None):
        self.evaluations += 1
        route = stochastic_route(t, self.num_steps, self.teacher_steps, isinstance(self.teacher, Gaussian))
        return x_along(route, self.teacher, z, condition)


def jump(i: int, num_steps: int, teacher_steps: list[int]) -> list[Fraction]:
    """The times after i/N of the first teacher's steps in a jump of the student whose teachers are of `teacher_steps`.

    The last of these is its own, the first that of the student which the first teacher taught.
    """
    *before, k = teacher_steps
    end = max(i - 2, 0)
    if not before:
        return [Fraction(i, num_steps) - Fraction((i - end) * (j + 1), k * num_steps) for j in range(k)]
    now, times = k * i, []
    while now > k * end:
        times += jump(now, k * num_steps, before)
        now = max(now - 2, k * end)
    return times


@pytest.mark.parametrize("schedule", [SCHEDULES["zero"], SCHEDULES["edm"]], ids=["zero", "edm"])
@given(num_steps=st.integers(1, 4), k=st.integers(2, 4), before=st.none() | st.integers(2, 3), seed=seeds)
@hypothesis_settings(deadline=None, max_examples=25)
def test_a_learnt_jump_lands_where_the_teachers_steps_do(schedule, num_steps, k, before, seed):
    """Taught by a teacher of every time, or by a student that was; the examples of a batch at different times."""
    teacher = gaussian = Gaussian(schedule)
    if before is not None:
        teacher = Learnt(gaussian, k * num_steps, before)
    learnt = Learnt(teacher, num_steps, k)
    numbers = [1, num_steps, 1 + seed % num_steps]
    z, t = noise(seed), torch.tensor(numbers, dtype=torch.float64) / num_steps
    x = learnt(z, t)
    assert before is None or teacher.evaluations == (k if num_steps > 1 else -(-k // 2))
    assert learnt(z.float(), t.float()).isfinite().all()
    for number, z_t, x_target in zip(numbers, z[:, None], x[:, None], strict=True):
        times = [Fraction(number, num_steps), *jump(number, num_steps, [k] if before is None else [before, k])]
        assert times[-1] == Fraction(max(number - 2, 0), num_steps)
        at = [torch.tensor([float(time)], dtype=torch.float64) for time in times]
        logsnrs = [logsnr_on_grid(schedule, time, 1) for time in at]
        landed = z_t
        for now, *pair in zip(at, logsnrs, logsnrs[1:], strict=False):
            landed = ddim_step(landed, gaussian(landed, now), *pair, schedule.alpha_sigma)
        ours = ddim_step(z_t, x_target, logsnrs[0], logsnrs[-1], schedule.alpha_sigma)
        torch.testing.assert_close(ours, landed, rtol=1e-8, atol=1e-8)


def test_the_method_trains_the_jumps():
    """A student that has learnt them has no loss; the target of the other kind is another one."""
    teacher = Gaussian()
    teacher.num_steps, learnt = None, Learnt(teacher, 4, 2)
    stage, x = Stage(1, 4, 0, 2, updates=1), torch.randn(16, *SHAPE[1:], dtype=torch.float64)
    assert Halving(stochastic=True).losses(learnt, teacher, stage, constant, x, None)[0].max() < 1e-20
    assert Halving().losses(learnt, teacher, stage, constant, x, None)[0].max() > 1e-6
    second = Halving(stochastic=True, teacher_order=2).losses(learnt, teacher, stage, constant, x, None)[0]
    assert second.isfinite().all() and second.max() > 1e-9


def test_it_is_remembered_and_nothing_else_has_changed(student, tmp_path):  # noqa: F811
    denoiser = student("v", SCHEDULES["cosine"], 4)
    before = denoiser.fingerprint
    assert "sampler" not in denoiser.architecture
    denoiser.save(tmp_path / "ddim")
    denoiser.sampler = "stochastic"
    denoiser.save(tmp_path / "stochastic")
    ddim, stochastic = (json.loads((tmp_path / k / "denoiser.json").read_text()) for k in ("ddim", "stochastic"))
    assert "sampler" not in ddim and stochastic["sampler"] == "stochastic" and ddim["fingerprint"] == before
    again = Denoiser.load(tmp_path / "stochastic")
    assert again.sampler == "stochastic" and again.fingerprint == denoiser.fingerprint != before
    assert Denoiser.load(tmp_path / "ddim").fingerprint == before
    (tmp_path / "stochastic" / "denoiser.json").write_text(json.dumps(stochastic | {"sampler": "nobody's"}))
    with pytest.raises(UserError, match='cannot be loaded: sampler "nobody\'s" is neither built in'):
        Denoiser.load(tmp_path / "stochastic")


def test_who_is_sampled_by_what(student):  # noqa: F811
    teacher, ddim, stochastic = (student("v", SCHEDULES["cosine"], n) for n in (None, 4, 4))
    stochastic.sampler = "stochastic"
    assert [sampler_of(d) for d in (teacher, ddim, stochastic, object())] == ["ddim", "ddim", "stochastic", "ddim"]
    assert sampler_of(teacher, "stochastic") == "stochastic" and sampler_of(ddim, "unipc") == "unipc"
    for denoiser, asked in ((ddim, "stochastic"), (stochastic, "ddim"), (stochastic, "ancestral")):
        with pytest.raises(ValueError, match=f"distilled for the sampler {denoiser.sampler}, not {asked}") as error:
            sample(denoiser, torch.zeros(1, 1, 8, 8), 4, sampler=asked)
        assert "\n" not in str(error.value)
    torch.manual_seed(0)
    images = [sample(d, torch.zeros(1, 1, 8, 8), 1) for d in (ddim, stochastic)]
    assert torch.equal(*images)  # a single step draws no noise


FOLDERS = {
    "v": ("v", SCHEDULES["cosine"], None),
    "flow of classes": ("flow", FlowSchedule(), 3),
    "edm": ("edm", SCHEDULES["edm"], None),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("num_steps", [1, 4])
def test_by_the_pipeline_in_the_folder(student, tmp_path, kind, num_steps):  # noqa: F811
    name, schedule, classes = FOLDERS[kind]
    denoiser = student(name, schedule, num_steps, classes)
    denoiser.sampler = "stochastic"
    denoiser.save(tmp_path / "student")
    generator = torch.Generator().manual_seed(SEED)
    first, *others = (torch.randn(BATCH, 1, 8, 8, generator=generator) for _ in range(num_steps))
    noises = dict(zip(range(num_steps - 1, 0, -1), others, strict=True))
    labels = None if classes is None else torch.tensor([0, 1, 2, 0])
    for clip in (True, False):
        ours = sample(denoiser, first, num_steps, labels, clip=clip, step_noise=noises.__getitem__).clamp(-1, 1)
        assert same(ours, drawn(tmp_path / "student", ours=True, clip=clip))


def weights(directory: Path, stage: str) -> str:
    content = (directory / stage / "denoiser" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


TINY = ("distill.py", "experiment=smoke", "name=stochastic", "method.stochastic=true", "steps.plan=[8,4,2]")
TINY += ("training.updates=8", "steps.updates=4", "steps.updates_last_two=4", "metrics.num_samples=50")
TINY += ("metrics.extractor.max_updates=10", "samples_every_n_updates=null")


def test_a_run_draws_its_students_by_their_sampler(told, workplace, monkeypatch):
    """And a stage that is done again is taught by what lies on the disk."""
    monkeypatch.setattr(timing, "BATCH", 1)
    status, err = told(*TINY)
    assert status == 0, err
    chain = workplace / "outputs" / "stochastic"
    rows = json.loads((chain / "summary.json").read_text())
    samplers = {row["stage"]: row["provenance"]["sampler"] for row in rows}
    assert samplers == {"teacher": "ddim", "steps-0004": "stochastic", "steps-0002": "stochastic"}
    for row in rows:
        assert Denoiser.load(chain / row["denoiser"]).sampler == samplers[row["stage"]]
    found = contenders(Evaluate(denoiser=str(chain), baselines=["stochastic"], num_steps=4), load)
    assert {(Path(c.path).parent.name, c.sampler, c.num_steps) for c in found} == {
        ("steps-0002", "stochastic", 2),
        ("steps-0004", "stochastic", 4),
        ("teacher", "stochastic", 4),
    }
    before = weights(chain, "steps-0002")
    shutil.rmtree(chain / "steps-0002")
    (chain / "summary.json").unlink()
    assert told(*TINY)[0] == 0
    assert weights(chain, "steps-0002") == before


@pytest.fixture
def students(workplace) -> None:
    """Denoisers of 4 steps in the workplace: `ddim-4` and `stochastic-4`."""
    denoiser = new_denoiser()
    denoiser.num_steps = 4
    denoiser.save(workplace / "ddim-4")
    denoiser.sampler = "stochastic"
    denoiser.save(workplace / "stochastic-4")


BAD = [
    ("distill.py method.stochastic=perhaps", ["method.stochastic=perhaps must be true or false"]),
    ("distill.py method.stochastic=true teacher=ddim-4 steps.plan=[4,2]", ["sampler ddim", "method.stochastic=false"]),
    ("distill.py teacher=stochastic-4 steps.plan=[4,2]", ["sampler stochastic", "method.stochastic=true"]),
    ("distill.py method=tract teacher=stochastic-4 steps.plan=[4,2]", ["sampler stochastic", "method=halving"]),
    (
        "distill.py method=parallel_decoding teacher=stochastic-4 steps.plan=[4,2]",
        ["sampler stochastic", "the teacher it was distilled from"],
    ),
    (
        "distill.py method.stochastic=true teacher=stochastic-4 steps.plan=[4,2] "
        "metrics.teacher_curve={steps:[4],samplers:[ddim]}",
        ["metrics.teacher_curve=", "distilled for the sampler stochastic, not ddim"],
    ),
    ("sample.py denoiser=stochastic-4 sampler=ancestral", ["for the sampler stochastic, not ancestral"]),
    ("sample.py denoiser=ddim-4 sampler=stochastic", ["for the sampler ddim, not stochastic"]),
    ("evaluate.py denoiser=stochastic-4 samplers=[stochastic,ddim]", ["samplers=", "not ddim"]),
    ("evaluate.py denoiser=ddim-4 samplers=stochastic", ["samplers=stochastic", "not stochastic"]),
]


@pytest.mark.parametrize(("command", "words"), BAD, ids=[command for command, _ in BAD])
def test_one_line_before_work_starts(told, workplace, students, command, words):
    before = set(workplace.rglob("outputs/*"))
    status, err = told(*command.split(" "))
    assert status == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert set(workplace.rglob("outputs/*")) == before


def test_commands_of_the_other_kind(students, workplace, tmp_path, monkeypatch):
    """Export refuses it, evaluate takes it alone of all samplers, its card says what it is."""
    monkeypatch.chdir(workplace)
    with pytest.raises(UserError, match="distilled for the sampler stochastic, and export writes ddim alone") as error:
        export.main(["stochastic-4", "--output", str(tmp_path / "a.onnx")])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    place = str(workplace / "stochastic-4")
    for samplers in (None, "all"):
        found = contenders(Evaluate(denoiser=place, samplers=samplers), load)
        assert found == [Contender("denoiser, stochastic", place, "stochastic", 4)]
    names = [c.sampler for c in contenders(Evaluate(denoiser=str(workplace / "ddim-4"), samplers="all"), load)]
    assert "stochastic" not in names and "ancestral" in names
    push.main(["stochastic-4", "me/students", "--local", str(tmp_path / "folder")])
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "| sampler | stochastic |" in card and "has its sampler, that of" in card and "trust_remote_code" in card


def test_modules_refuse_teachers_of_the_other_kind():
    teacher = new_denoiser()
    assert DistillationModule(teacher, STAGE, recipe(), Halving(stochastic=True)).student.sampler == "stochastic"
    teacher.num_steps = 8
    with pytest.raises(UserError, match=r"method\.stochastic=false"):
        DistillationModule(teacher, STAGE, recipe(), Halving(stochastic=True))
    teacher.sampler = "stochastic"
    for method in (Halving(), Tract()):
        with pytest.raises(UserError, match=r"method=halving method\.stochastic=true"):
            DistillationModule(teacher, STAGE, recipe(), method)
    start = new_denoiser()
    start.sampler = "stochastic"
    assert DistillationModule(new_denoiser(), STAGE, recipe(), Tract(), start=start).student.sampler == "ddim"
