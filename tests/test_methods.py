"""Methods that finish a teacher's step with the student itself: identities, grids, whole runs stopped and resumed."""

import copy
import hashlib
import json
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from test_maths import PROCESSES, Gaussian, noise
from test_training import STAGE, new_denoiser, recipe, stopped, train, trainer, weights

from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.method.multistep_consistency import MultistepConsistency
from pdistill.method.tract import Tract
from pdistill.sampling import ddim_step, sample
from pdistill.schedule import logsnr_on_grid
from pdistill.steps import Stage
from pdistill.target import consistency_target, with_variance
from pdistill.training.distillation import DistillationModule
from pdistill.weighting import constant


class Consistent:
    """From any i/fine, the x whose one step lands where the teacher's steps of 1/fine do, at the group's end.

    Steps and inverse are written out here, one image and one step at a time.
    """

    def __init__(self, teacher, num_steps: int, fine: int) -> None:
        self.teacher, self.schedule, self.fine, self.group = teacher, teacher.schedule, fine, fine // num_steps

    def alpha_sigma(self, i: int):
        at = torch.tensor([i], dtype=torch.float64)
        return [float(a) for a in self.schedule.alpha_sigma(logsnr_on_grid(self.schedule, at, self.fine))]

    def __call__(self, z, t, condition=None):
        return torch.cat(
            [self.of_one(image[None], round(at * self.fine)) for image, at in zip(z, t.tolist(), strict=True)]
        )

    def of_one(self, z, i: int):
        if i == 0:
            return z
        end, landed = (i - 1) // self.group * self.group, z
        for j in range(i, end, -1):
            (a, s), (a_next, s_next) = self.alpha_sigma(j), self.alpha_sigma(j - 1)
            x_hat = self.teacher(landed, torch.tensor([j / self.fine], dtype=torch.float64))
            landed = a_next * x_hat + s_next / s * (landed - a * x_hat)
        (a, s), (a_end, s_end) = self.alpha_sigma(i), self.alpha_sigma(end)
        return (landed - s_end / s * z) / (a_end - s_end / s * a)


class Speaks:
    """A denoiser that is a function of (z, t)."""

    def __init__(self, schedule, function) -> None:
        self.schedule, self.function = schedule, function

    def __call__(self, z, t, condition=None):
        return self.function(z, t)


def losses(method, student, teacher, stage: Stage, seed: int = 0):
    """Of sixteen images from the teacher's own distribution."""
    torch.manual_seed(seed)
    x = teacher.mean + teacher.std * torch.randn(16, *teacher.mean.shape, dtype=torch.float64)
    return method.losses(student, teacher, stage, constant, x, None)


@PROCESSES
@pytest.mark.parametrize(("num_steps", "group"), [(1, 8), (4, 3), (2, 1)])
def test_a_consistent_student_has_no_loss_and_another_has(schedule, num_steps, group):
    teacher = Gaussian(schedule)
    student = Consistent(teacher, num_steps, num_steps * group)
    stage = Stage(1, num_steps, 0, group, updates=1)
    tract, multistep = Tract(clip=False), MultistepConsistency(num_steps * group, num_steps * group)
    tract.self_teacher = student
    for method in (tract, multistep):
        assert losses(method, student, teacher, stage)[0].max() < 1e-16
    tract.self_teacher = teacher
    off = torch.cat(
        [losses(method, teacher, teacher, stage, seed)[0] for method in (tract, multistep) for seed in (0, 1)]
    )
    assert (off > 1e-9).any() == (group > 1)  # at a group of one the teacher is the student that is asked for
    wrong = Speaks(schedule, lambda z, t: student(z, t) + 0.1)
    tract.self_teacher = student
    assert (losses(tract, wrong, teacher, stage)[0] - 0.01).abs().max() < 1e-12


@PROCESSES
def test_the_target_lands_where_the_two_steps_do(schedule):
    """Against the inverse of a step, with any reference; in float32 it loses no digits."""
    z, x_hat, x_next, fine = noise(4), noise(5), noise(6), 1024
    for i, end in [(1024, 0), (1024, 512), (700, 699), (700, 640), (1, 0), (2, 0)]:
        at = [torch.full((3,), float(k), dtype=torch.float64) for k in (i, i - 1, end)]
        logsnr = [logsnr_on_grid(schedule, k, fine) for k in at]
        (a, s), (a_end, s_end) = (schedule.alpha_sigma(logsnr[k]) for k in (0, 2))
        landed = z_m = ddim_step(z, x_hat, *logsnr[:2], schedule.alpha_sigma)
        if i - 1 > end:
            landed = ddim_step(z_m, x_next, *logsnr[1:], schedule.alpha_sigma)
        r = (s_end / s)[:, None, None, None]
        expected = (landed - r * z) / (a_end[:, None, None, None] - r * a[:, None, None, None])
        reference = Speaks(schedule, lambda z, t, x=x_next: x.to(z.dtype))
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            grid = (at[0].long(), at[2].long(), fine)
            ours = consistency_target(reference, z.to(dtype), x_hat.to(dtype), grid)
            torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


@PROCESSES
def test_addim_gives_the_noise_its_length(schedule):
    """z_s = alpha_s x_hat + F eps_hat, F^2 |eps_hat|^2 / d = sigma_s^2 |eps_hat|^2 / d + g^2 v; at s = 0 nothing."""
    t, s, v = (torch.full((3,), k, dtype=torch.float64) for k in (0.7, 0.6, 0.03))
    logsnrs = schedule(t), schedule(s)
    (a, b), (a_s, b_s) = ((q[:, None, None, None] for q in schedule.alpha_sigma(logsnr)) for logsnr in logsnrs)
    z, x_hat = noise(1), noise(2)
    eps_hat, g = (z - a * x_hat) / b, a_s - b_s / b * a
    d = with_variance(x_hat, z, logsnrs, v, schedule.alpha_sigma)
    left = ddim_step(z, d, *logsnrs, schedule.alpha_sigma) - a_s * x_hat
    size = lambda y: y.square().mean((1, 2, 3))  # noqa: E731
    torch.testing.assert_close(size(left), size(b_s * eps_hat) + v * g.flatten() ** 2)
    ended = with_variance(x_hat, z, (logsnrs[0], torch.full_like(t, torch.inf)), v, schedule.alpha_sigma)
    assert torch.equal(ended, x_hat)


def test_addim_moves_the_target():
    teacher = Gaussian()
    stage = Stage(1, 2, 0, 1, updates=1)
    plain, lengthened = (losses(MultistepConsistency(8, 8, addim=a), teacher, teacher, stage)[0] for a in (False, True))
    assert lengthened.isfinite().all() and not torch.equal(plain, lengthened)


def test_the_grid_grows_and_keeps_the_tops_of_segments():
    method = MultistepConsistency(64, 1280, annealed=0.5)
    grids = {}
    for done in range(201):
        method.before_update(None, done, 200)
        grids[done] = [method.segment(k) * k for k in (1, 2, 4, 8, 12, 100)]
    assert grids[0] == [64, 64, 64, 64, 60, 100]
    assert grids[100] == grids[200] == [1280, 1280, 1280, 1280, 1284, 1300]
    assert grids[50] == [286, 286, 288, 288, 288, 300]  # 64 sqrt(20) = 286.2
    assert all(grids[k][0] <= grids[k + 1][0] for k in range(200))
    seen: set[float] = set()
    teacher = Gaussian()
    recorder = type(
        "R", (), {"schedule": teacher.schedule, "__call__": lambda self, z, t, c: (seen.update(t.tolist()), z)[1]}
    )()
    method = MultistepConsistency(6, 6)
    for seed in range(30):
        torch.manual_seed(seed)
        x = torch.randn(8, 2, 4, 4, dtype=torch.float64)
        method.losses(recorder, teacher, Stage(1, 3, 0, 1, updates=1), constant, x, None)
    assert {round(6 * t) for t in seen} == {0, 1, 2, 3, 4, 5, 6}


def test_the_self_teacher_is_the_bias_corrected_average(tiny):
    method, student = Tract(self_teacher_decay=0.5), tiny()
    history = []
    for done in range(4):
        with torch.no_grad():
            [p.add_(torch.randn_like(p)) for p in student.parameters()]
        history.append(copy.deepcopy(list(student.parameters())))
        method.before_update(student, done, 4)
        shares = [0.5 ** (done - j) for j in range(done + 1)]
        for k, mine in enumerate(method.self_teacher.parameters()):
            expected = sum(w * theirs[k] for w, theirs in zip(shares, history, strict=True)) / sum(shares)
            torch.testing.assert_close(mine, expected.detach(), rtol=1e-4, atol=1e-5)
            assert not mine.requires_grad
    method.before_update(student, 0, 4)  # a stage begins: nothing of the one before
    assert all(map(torch.equal, method.self_teacher.parameters(), student.parameters()))


class Asked(torch.nn.Module):
    """A method that notes when it is told of an update, and with what weights."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def before_update(self, student, done, updates):
        self.calls.append((done, updates, float(next(student.parameters()).detach().sum())))

    def losses(self, student, teacher, stage, weighting, x, condition):
        self.calls.append("batch")
        assert not self.training and student.training
        t = torch.full((len(x),), 0.5)
        return (student(x, t) - x).square().mean((1, 2, 3)), t


def test_the_hook_comes_once_before_every_update(denoiser, tmp_path):
    method = Asked()
    whole = DistillationModule(copy.deepcopy(denoiser), STAGE, recipe(), method)
    train(whole, tmp_path / "whole", trainer=trainer(3))
    calls = whole.method.calls
    assert [c if c == "batch" else c[:2] for c in calls] == [(0, 6)] + [
        c for k in range(6) for c in [(k, 6), "batch", "batch", "batch"]
    ]
    assert method.calls == []  # the stage has its own copy
    told = [c for c in calls if c != "batch"][1:]
    assert len({c[2] for c in told}) == 6  # the weights moved between them
    stopped(
        DistillationModule(copy.deepcopy(denoiser), STAGE, recipe(), method), tmp_path / "cut", 4, trainer=trainer(3)
    )
    resumed = DistillationModule(copy.deepcopy(denoiser), STAGE, recipe(), method)
    train(resumed, tmp_path / "cut", trainer=trainer(3))
    assert [c for c in resumed.method.calls if c != "batch"][1:] == told[4:]


@pytest.fixture
def denoiser() -> Denoiser:
    return new_denoiser()


@pytest.mark.parametrize("method", [Tract(), MultistepConsistency(8, 64, addim=True)], ids=["tract", "multistep"])
def test_a_resumed_stage_is_the_same_to_the_byte(denoiser, tmp_path, method):
    def module():
        return DistillationModule(copy.deepcopy(denoiser), STAGE, recipe(), method)

    train(module(), tmp_path / "whole", trainer=trainer(2))
    stopped(module(), tmp_path / "cut", 3, trainer=trainer(2))
    train(module(), tmp_path / "cut", trainer=trainer(2))
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    student = module()
    trained = {id(p) for group in student.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert trained == {id(p) for p in student.student.parameters()}


QUICK = ["experiment=smoke", "training.updates=6", "steps.updates=4", "steps.updates_last_two=10", "metrics=none"]
QUICK += ["checkpoint_every_n_updates=2"]
RUNS = {
    "tract": ("method=tract", "steps.plan=[8,4,1]"),
    "multistep": ("method=multistep_consistency", "steps.plan=[8,4,1]", "method.teacher_steps_from=8"),
}


def digests(directory) -> dict[str, str]:
    files = sorted(p for p in directory.glob("steps-*/denoiser/**/*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("name", ["tract", pytest.param("multistep", marks=pytest.mark.slow)])
def test_a_whole_run_that_was_killed_in_its_last_stage_ends_byte_identical(start, told, workplace, name):
    command = ("distill.py", *QUICK, *RUNS[name])
    status, err = told(*command, f"name={name}")
    assert status == 0, err
    whole, cut = (workplace / "outputs" / n for n in (name, f"{name}-cut"))
    rows = json.loads((whole / "summary.json").read_text())
    assert [(row["stage"], row["num_steps"]) for row in rows] == [("teacher", 8), ("steps-0004", 4), ("steps-0001", 1)]
    process = start(*command, f"name={cut.name}")
    deadline = time.monotonic() + 100
    while not (cut / "steps-0001" / "last.ckpt").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (cut / "steps-0001" / "metrics.json").exists()
    status, err = told(*command, f"name={cut.name}")
    assert status == 0, err
    assert digests(whole) == digests(cut) and len(digests(whole)) > 4
    student = Denoiser.load(whole / "steps-0001" / "denoiser")
    assert sample(student, torch.randn(2, *student.image_shape), 1).isfinite().all()


def test_who_teaches_whom():
    steps = SimpleNamespace(plan=[1024, 32, 4, 1], updates=5, updates_last_two=7)
    tract, multistep = Tract().stages(steps), MultistepConsistency().stages(steps)
    assert [(s.num_steps, s.teacher, s.teacher_steps) for s in tract] == [(32, 0, 32), (4, 1, 8), (1, 2, 4)]
    assert [(s.num_steps, s.teacher, s.updates) for s in multistep] == [(32, 0, 5), (4, 0, 7), (1, 0, 7)]
    with pytest.raises(UserError, match=r"5 does not divide 32"):
        Tract().stages(SimpleNamespace(plan=[32, 5], updates=1, updates_last_two=1))


BAD = [
    ("method=tract steps.plan=[32,5]", ["5 does not divide 32"]),
    ("method=tract distillation.max_teacher_steps=8", ["distillation.max_teacher_steps=8", "method=tract", "leave it"]),
    ("method=tract method.self_teacher_decay=1", ["method.self_teacher_decay=1", "[0, 1)"]),
    ("method=tract method.clip=perhaps", ["method.clip=perhaps must be true or false"]),
    ("method=multistep_consistency steps.plan=[4096,1024]", ["method.teacher_steps_to=1280", "at least 2048"]),
    ("method=multistep_consistency method.teacher_steps_from=0", ["method.teacher_steps_from=0"]),
    ("method=multistep_consistency method.teacher_steps_to=8", ["method.teacher_steps_to=8", "at least 64"]),
    ("method=multistep_consistency method.annealed=2", ["method.annealed=2", "at most 1"]),
    ("method=multistep_consistency method.addim=1", ["method.addim=1 must be true or false"]),
    ("method=multistep_consistency distillation.max_teacher_steps=4", ["distillation.max_teacher_steps=4"]),
    ("method=multistep_consistency teacher=<student> steps.plan=[8,4]", ["8 steps", "every time", "method=halving"]),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[words for words, _ in BAD])
def test_bad_settings_are_refused_in_one_line(told, workplace, words, said):
    student = new_denoiser()
    student.num_steps = 8
    student.save(workplace / "student-of-8")
    before = set((workplace / "outputs").glob("*"))
    status, err = told("distill.py", *words.replace("<student>", "student-of-8").split())
    assert status == 2 and err.count("\n") == 1 and all(word in err for word in said), err
    assert set((workplace / "outputs").glob("*")) == before
