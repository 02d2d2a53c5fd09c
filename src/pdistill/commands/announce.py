"""The parts of a run, for its display: what is to be done, and how many images networks see in it."""

import torch

from pdistill.commands import estimate
from pdistill.commands.job import GRID_IMAGES, Job
from pdistill.commands.preflight import Plan
from pdistill.commands.settings import Train
from pdistill.commands.timing import BATCH, BUDGET, ROUNDS
from pdistill.denoiser import Denoiser
from pdistill.display import AFTERWARDS, EXPORTING, MEASURING, SAMPLING, TRAINING, Display, Part
from pdistill.processes import is_main
from pdistill.steps import CONVERTED, GUIDED

TEACHER_PASSES, USUAL_PASSES = 3, 5  # of an update: with gradients three, and two of the teacher's


def of_training(job: Job, denoiser: Denoiser) -> Display:
    """The display of a run that trains a teacher alone."""
    settings = job.settings
    section, num_steps = settings.training, settings.steps.plan[0]
    training = Part("teacher", TRAINING, section.updates * section.batch_size * TEACHER_PASSES)
    parts = [training, *_curve(settings, "teacher"), *_finishing(job, "teacher", num_steps), _timing([num_steps])]
    return _display(job, parts, denoiser, [num_steps])


def of_distillation(job: Job, plan: Plan) -> Display:
    """The display of a run that distils."""
    settings = job.settings
    if not settings.trainer["enable_progress_bar"] or not is_main():
        return Display([Part("teacher", MEASURING, 0)], shown=False)
    images = _images(job, plan)
    first = settings.steps.plan[0]
    stages = [("teacher", first)] + [(CONVERTED, first)] * plan.converts + [(GUIDED, first)] * plan.guides
    for stage in plan.stages:
        stages += [(stage.name, stage.num_steps), *((f"steps-{n:04d}", n) for n in stage.counts)]
    parts = []
    for name, num_steps in stages:
        parts += [Part(name, TRAINING, images[name])] if name in images else []
        parts += _finishing(job, name, num_steps)
    counts = [num_steps for _, num_steps in stages]
    parts += [*_curve(settings, AFTERWARDS), _timing(counts), Part(AFTERWARDS, EXPORTING, 0)]
    return _display(job, parts, plan.given or plan.template, counts)


def _images(job: Job, plan: Plan) -> dict[str, float]:
    """That networks see in the training of each stage. A method may be anybody's, and not run on a small network."""
    settings = job.settings
    try:
        with torch.random.fork_rng(devices=[]):
            rows = estimate.trainings(settings, plan.given is None, plan.given or plan.template)  # type: ignore[arg-type]
        return {row.name: row.images for row in rows}
    except Exception:
        section = settings.distillation
        each = float(section.batch_size * USUAL_PASSES)
        last = settings.steps.updates_last_two
        found = dict.fromkeys([CONVERTED] * plan.converts + [GUIDED] * plan.guides, last * each)
        if plan.given is None:
            found["teacher"] = settings.training.updates * settings.training.batch_size * TEACHER_PASSES
        return found | {stage.name: stage.updates * each for stage in plan.stages}


def _finishing(job: Job, name: str, num_steps: int) -> list[Part]:
    measuring = [] if job.fid is None else [Part(name, MEASURING, job.fid.num_samples * num_steps)]
    return [*measuring, Part(name, SAMPLING, GRID_IMAGES * num_steps)]


def _curve(settings: Train, stage: str) -> list[Part]:
    curve = settings.metrics.teacher_curve
    if settings.metrics.extractor is None or curve is None:
        return []
    return [Part(stage, MEASURING, settings.metrics.num_samples * n) for _ in curve["samplers"] for n in curve["steps"]]


def _timing(counts: list[int]) -> Part:
    return Part(AFTERWARDS, MEASURING, BATCH * ROUNDS * sum(counts), most_seconds=BUDGET)


def _display(job: Job, parts: list[Part], denoiser: Denoiser, counts: list[int]) -> Display:
    """Says in a line what was chosen."""
    display = Display(parts, shown=job.settings.trainer["enable_progress_bar"] and is_main())
    data = job.data
    classes = "" if data.labels is None else f", {data.num_classes} classes"
    metric = "" if job.fid is None else f"; {job.fid.name} of {job.fid.num_samples:,} samples"
    parameters = sum(p.numel() for p in denoiser.network.parameters())
    display.say(
        f"{data.name}: {len(data.images):,} images of {'x'.join(map(str, data.image_shape))}{classes}; a network of "
        f"{parameters / 1e6:.2f} M parameters{metric}; in {', '.join(map(str, dict.fromkeys(counts)))} steps"
    )
    return display
