"""Students that were taught their teacher's guidance: one evaluation a step."""

import json
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from test_training import StopAt, settings, weights

from pdistill import Denoiser, sample
from pdistill.dataset import digits
from pdistill.errors import Interrupted, UserError
from pdistill.heads import fused
from pdistill.method.guidance import Guidance
from pdistill.method.halving import Halving
from pdistill.method.multistep_consistency import MultistepConsistency
from pdistill.method.parallel_decoding import ParallelDecoding
from pdistill.method.tract import Tract
from pdistill.network import with_guidance
from pdistill.training.data import ImageDataModule
from pdistill.training.distillation import DistillationModule
from pdistill.training.fit import fit
from pdistill.training.module import Recipe
from pdistill.training.settings import Distillation, Guiding, Steps
from pdistill.weighting import constant, snr_plus_one

STAGE = Guidance(1, 5).stages(Steps([8, 4, 2, 1], 6, 6))[0]
LABELS = torch.tensor([0, 1, 2])


def noise() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def teacher(tiny):
    """A denoiser of a few classes, and a label for none."""

    def teacher(name: str = "v", classes: int = 3, **options) -> Denoiser:
        denoiser = tiny(name, num_classes=classes + 1, **options)
        denoiser.null_label = classes
        return denoiser

    return teacher


def guided(denoiser: Denoiser, low: float = 1, high: float = 5) -> Denoiser:
    """As after the first stage: it heeds the guidance."""
    student = Guidance(low, high).begin(denoiser, STAGE)
    torch.manual_seed(2)
    for name, parameter in student.network.named_parameters():
        if "class_embedding.guidance" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return student.eval()


@torch.no_grad()
def test_before_the_first_update_it_is_its_teacher(teacher):
    student = Guidance(1, 5).begin(teacher(), STAGE)
    t = torch.tensor([1.0, 0.6, 0.2])
    told = student.told(LABELS, torch.tensor([1.0, 2.0, 5.0]))
    assert torch.equal(student(noise(), t, told), teacher()(noise(), t, LABELS))
    assert not torch.equal(guided(teacher())(noise(), t, told), teacher()(noise(), t, LABELS))
    same = teacher()
    torch.manual_seed(7)  # what came before does not matter: a stage is begun again in another process
    assert Guidance(1, 5).begin(same, STAGE).fingerprint == student.fingerprint
    fixed = Guidance(2, 2).begin(teacher(), STAGE)
    assert type(fixed.network) is type(teacher().network) and fixed.default_guidance == 2


@pytest.mark.parametrize("clip", [True, False])
def test_a_perfect_student_has_no_loss(teacher, clip):
    """The target by hand: what `sample` with guidance takes a step with, at every guidance of the range."""
    known, seen = teacher(seed=3), []

    class Perfect(Denoiser):
        def forward(self, z, t, condition=None):
            seen.append(condition["guidance"])
            none, g = known(z, t, torch.full_like(LABELS, 3).repeat(20)), condition["guidance"][:, None, None, None]
            x_hat = none + g * (known(z, t, condition["label"]) - none)
            return x_hat.clamp(-1, 1) if clip else x_hat

    module = DistillationModule(known, STAGE, Recipe(Distillation(), constant), Guidance(0.5, 4, clip=clip))
    student = module.denoiser
    student.__class__ = Perfect
    batch = {"image": torch.randn(60, 1, 8, 8).clamp(-1, 1), "label": LABELS.repeat(20)}
    losses, _ = module.losses(batch)
    assert float(losses.max()) < 1e-9
    drawn = torch.cat(seen)
    assert 0.5 <= drawn.min() < 1 and 3.5 < drawn.max() <= 4


@pytest.mark.parametrize("guidance", [(1, 5), (2, 2)])
def test_the_stage_is_resumed_byte_for_byte(teacher, tmp_path, guidance):
    """And lowers its loss: a student that heeds no guidance cannot."""

    def train(directory, **changes):
        recipe = Recipe(Guiding(learning_rate=1e-3), snr_plus_one)
        module = DistillationModule(teacher(classes=10), STAGE, recipe, Guidance(*guidance))
        fit(module, ImageDataModule(digits(), 12, seed=0, stage=STAGE.index), settings(directory, **changes))

    train(tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        train(tmp_path / "resumed", callbacks=[StopAt(3)])
    train(tmp_path / "resumed")
    assert weights(tmp_path / "undisturbed") == weights(tmp_path / "resumed")
    student = Denoiser.load(tmp_path / "resumed" / "denoiser")
    assert student.guidance == guidance and student.lineage == ["teacher", "guided"] and student.num_steps is None
    again = Denoiser.load(tmp_path / "resumed" / "denoiser")
    again.guidance = (1.0, 4.0)
    assert again.fingerprint != student.fingerprint


METHODS = {
    "halving": (Halving(), [8, 4]),
    "tract": (Tract(), [8, 2]),
    "multistep_consistency": (MultistepConsistency(), [8, 4]),
    "parallel_decoding": (ParallelDecoding(), [8, 4, 2]),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_hands_the_guidance_on(teacher, name):
    """Both are told the same guidance, and an update trains what reads it."""
    method, plan = METHODS[name]
    (stage,) = method.stages(Steps(plan, 6, 6), 2)
    module = DistillationModule(guided(teacher()), stage, Recipe(Distillation(), snr_plus_one), method)
    told: dict[str, list] = {"teacher": [], "student": []}
    for who, denoiser in (("teacher", module.teacher), ("student", module.student)):
        denoiser.network.register_forward_pre_hook(
            lambda m, args, kwargs, who=who: told[who].append(kwargs["guidance"]), with_kwargs=True
        )
    torch.manual_seed(0)
    losses, _ = module.losses({"image": torch.randn(3, 1, 8, 8).clamp(-1, 1), "label": LABELS})
    losses.mean().backward()
    first = told["student"][0]
    assert first.unique().numel() == 3 and all(torch.equal(g, first) for gs in told.values() for g in gs)
    assert float(module.student.network.class_embedding.guidance.linear_1.weight.grad.abs().max()) > 0
    module.student.eval()
    student = fused(module.student, 4) if name == "parallel_decoding" else module.student
    two, five = (sample(student, noise(), student.num_steps, LABELS, guidance=g) for g in (2.0, 5.0))
    assert not torch.allclose(two, five)


def test_sampling_takes_one_evaluation_and_refuses_what_was_not_taught(teacher):
    student, calls = guided(teacher()), []
    student.network.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(kwargs["guidance"].tolist()), with_kwargs=True
    )
    by_default = sample(student, noise(), 2, LABELS)
    assert torch.equal(by_default, sample(student, noise(), 2, LABELS, guidance=1.0))
    sample(student, noise(), 2, LABELS, guidance=5.0)
    assert calls == 4 * [[1.0] * 3] + 2 * [[5.0] * 3]
    with pytest.raises(ValueError, match=r"guidance=6 must be from 1 to 5, which"):
        sample(student, noise(), 2, LABELS, guidance=6.0)
    fixed = guided(teacher(), 2, 2)
    assert torch.equal(sample(fixed, noise(), 2, LABELS), sample(fixed, noise(), 2, LABELS, guidance=2.0))
    with pytest.raises(ValueError, match=r"guidance=1 must be 2, which"):
        sample(fixed, noise(), 2, LABELS, guidance=1.0)


@pytest.mark.parametrize("kind", ["v", "x_eps"])
def test_diffusers_opens_it(teacher, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    student = guided(teacher(kind))
    student.num_steps = 4
    student.save(tmp_path / "student")
    assert torch.equal(Denoiser.load(tmp_path / "student").network.conv_in.weight, student.network.conv_in.weight)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    for guidance in (None, 3.5):
        theirs = pipeline(
            3, torch.Generator().manual_seed(5), output_type="pt", class_labels=LABELS, guidance=guidance
        ).images
        ours = sample(student, noise(), 4, LABELS, guidance=guidance)
        assert torch.allclose(theirs * 2 - 1, ours, atol=2e-5)
    with pytest.raises(ValueError, match="guidance=6 is outside of what this model was taught, 1 to 5"):
        pipeline(class_labels=[0], guidance=6)


@pytest.fixture(scope="module")
def finished(run, workplace, once):
    """A run from the teacher to one step, with guidance."""
    command = ("conditional=true", "label_dropout=0.2", "guidance=[1,4]", "guiding.updates=5", "steps.plan=[4,2,1]")

    def make() -> None:
        status, _, err = run("distill.py", "experiment=smoke", *command, "metrics=none", "name=guided_students")
        assert status == 0, err

    return once(workplace / "outputs" / "guided_students", make)


def test_from_the_teacher_to_one_step(finished, told, workplace):
    rows = json.loads((finished / "summary.json").read_text())
    assert [row["stage"] for row in rows] == ["teacher", "guided", "steps-0002", "steps-0001"]
    assert [row["parent"] for row in rows] == [None, "teacher", "guided", "steps-0002"]
    student = Denoiser.load(finished / "steps-0001" / "denoiser")
    assert student.guidance == (1.0, 4.0) and student.lineage == ["teacher", "guided", 2, 1]
    assert "guided" in (finished / "report.html").read_text()
    grids = [workplace / f"guided-{g}.png" for g in (2, 4)]
    command = ("sample.py", f"denoiser={finished / 'steps-0001' / 'denoiser'}", "num_images=4", "label=3")
    for g, grid in zip((2, 4), grids, strict=True):
        status, err = told(*command, f"guidance={g}", f"output={grid}")
        assert status == 0, err
    assert grids[0].read_bytes() != grids[1].read_bytes()
    status, err = told(*command, "guidance=0")
    assert status == 2 and "guidance=0 must be from 1 to 4" in err and err.count("\n") == 1


def test_a_teacher_with_hidden_labels(finished, told, workplace):
    """It is guided at two evaluations a step, by any weight."""
    teacher, grid = finished / "teacher" / "denoiser", workplace / "teacher.png"
    assert Denoiser.load(teacher).null_label == Denoiser.load(teacher).num_classes == 10
    command = ("sample.py", f"denoiser={teacher}", "num_steps=4", "num_images=4", f"output={grid}")
    status, err = told(*command, "guidance=7", "label=3")
    assert status == 0 and grid.exists(), err
    status, err = told(*command, "label=10")
    assert status == 2 and "classes 0 to 9" in err
    status, err = told("distill.py", f"teacher={teacher}", "conditional=true")
    assert status == 2 and "null_label 10, configured None" in err
    status, err = told("train.py", "label_dropout=0.1")
    assert status == 2 and "add conditional=true" in err and err.count("\n") == 1


def test_from_a_guided_teacher_there_is_no_second_stage_of_it(finished, run, workplace):
    given = (f"teacher={finished / 'guided' / 'denoiser'}", "conditional=true", "label_dropout=0.2")
    options = ("experiment=smoke", "steps.plan=[2,1]", "steps.updates_last_two=2", "metrics=none", "name=goes_on")
    status, _, err = run("distill.py", *given, *options)
    assert status == 0, err
    rows = json.loads((workplace / "outputs" / "goes_on" / "summary.json").read_text())
    assert [row["stage"] for row in rows] == ["teacher", "steps-0001"]
    assert Denoiser.load(workplace / "outputs" / "goes_on" / "steps-0001" / "denoiser").guidance == (1.0, 4.0)


REFUSED = {
    "guidance=[5,1] conditional=true label_dropout=0.1": "guidance=[5, 1] must be a range [low, high] with 0 <= low",
    "guidance=[1,1] conditional=true label_dropout=0.1": "must be a range",
    "guidance=[1,2,3] conditional=true label_dropout=0.1": "must be a range",
    "guidance=-1 conditional=true label_dropout=0.1": "guidance=-1 must be",
    "guidance=two conditional=true label_dropout=0.1": "guidance=two must be",
    "guidance=[1,.nan] conditional=true label_dropout=0.1": "must be a range",
    "guidance=[1,5]": "add conditional=true label_dropout=0.1",
    "guidance=[1,5] conditional=true": "add conditional=true label_dropout=0.1",
    "teacher=PLAIN guidance=2 conditional=true": "has no null label: give one trained with label_dropout",
    "teacher=STUDENT guidance=[1,5] conditional=true label_dropout=0.1 steps.plan=[2,1]": "was taught [1.0, 4.0]",
    "teacher=HALVED guidance=2 conditional=true label_dropout=0.1 steps.plan=[2,1]": "was distilled for 2 steps",
    "teacher=TEACHER start=TEACHER guidance=2 conditional=true label_dropout=0.1": "leave start out",
    "teacher=STUDENT start=TEACHER conditional=true label_dropout=0.1 steps.plan=[2,1]": "guidance None, configured",
    "guiding.updates=0": "guiding.updates=0 must be",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_is_refused_before_any_work(finished, teacher, told, tmp_path, typed):
    words = typed.replace("STUDENT", str(finished / "steps-0002" / "denoiser"))
    words = words.replace("TEACHER", str(finished / "teacher" / "denoiser"))
    if "PLAIN" in typed or "HALVED" in typed:
        options = {"num_classes": 10 + ("HALVED" in typed)}
        denoiser = Denoiser.load(finished / "teacher" / "denoiser")
        if "PLAIN" in typed:
            denoiser.null_label, denoiser.network = None, _with_classes(denoiser.network, **options)
        else:
            denoiser.num_steps = 2
        denoiser.save(tmp_path / "denoiser")
        words = words.replace("PLAIN", str(tmp_path / "denoiser")).replace("HALVED", str(tmp_path / "denoiser"))
    status, err = told("distill.py", "experiment=smoke", "name=refused", *words.split())
    assert status == 2 and REFUSED[typed] in err and err.count("\n") == 1, err


def _with_classes(network, num_classes: int):
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    return type(network)(**config | {"num_class_embeds": num_classes})


def test_a_network_without_a_place_for_a_range(teacher):
    class Plain(torch.nn.Module):
        def forward(self, z, timestep, class_labels=None):
            return z

    class Willing(torch.nn.Module):
        def forward(self, z, timestep, class_labels=None, guidance=None):
            return z

    with pytest.raises(UserError, match="a Plain has no input for a range of guidance: give one value"):
        with_guidance(Plain())
    willing = Willing()
    assert with_guidance(willing) is willing
