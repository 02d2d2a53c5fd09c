"""Runs a plan stage by stage, and resumes it: what is finished is on disk, and is not done again.

<run>/teacher/ and <run>/steps-NNNN/ each end up with `denoiser/`, `samples.png` and `metrics.json`, written in this
order; while a stage trains, `last.ckpt` is what it resumes from.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from pdistill import lora
from pdistill.commands import run_directory
from pdistill.commands.denoisers import NEARLY_ZERO_SNR, check_stable, new_denoiser, new_student
from pdistill.commands.identity import is_imported
from pdistill.commands.settings import Distill, Train
from pdistill.commands.teachers import encoded_for, given_teacher, images_of, predicting
from pdistill.commands.timing import time_stages
from pdistill.dataset import ImageSet
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.files import read_json, write_json
from pdistill.method import check_sampler, sampler_taught
from pdistill.method.conversion import Conversion
from pdistill.method.guidance import Guidance
from pdistill.metrics.curve import measure_teacher
from pdistill.metrics.extractors import build
from pdistill.metrics.fid import FID
from pdistill.parameterization import Parameterization
from pdistill.processes import barrier, gather, is_main, of_main, rank, world_size
from pdistill.report import page
from pdistill.report.grids import nearest_neighbours, save_grid
from pdistill.sampling import DDIM, Draw, generate, sampler_of
from pdistill.schedule import DiscreteBetaSchedule
from pdistill.steps import CONVERTED, GUIDED, Stage
from pdistill.training.data import ImageDataModule
from pdistill.training.distillation import DistillationModule
from pdistill.training.film import film_of
from pdistill.training.fit import FitSettings, accumulated_batches, fit, quietly, start_processes
from pdistill.training.logger import closing, log_stage, log_summary, metric_prefix
from pdistill.training.module import DenoisingModule, Recipe
from pdistill.training.settings import Conversion as Converting
from pdistill.training.settings import Optimization
from pdistill.training.teacher import TeacherModule

GRID_IMAGES = 64
FRAME_IMAGES = 4  # the first of the grid
NEIGHBOURS_OF = 12  # samples


@dataclass
class Job:
    """What every stage of a run shares."""

    settings: Train
    directory: Path
    data: ImageSet
    fid: FID | None
    loggers: list[Logger]
    device: torch.device

    def recipe(self, section: Optimization) -> Recipe:
        """How a stage trains."""
        return Recipe(
            section,
            instantiate(self.settings.weighting),
            optimizer=instantiate(self.settings.optimizer),
            seed=self.settings.seed,
            label_dropout=self.settings.label_dropout,
            lora_rank=self.settings.lora.rank if isinstance(self.settings, Distill) else None,
        )


def train(settings: Train, cfg: DictConfig, directory: Path) -> None:
    """A teacher, in `directory`/teacher. Raises UserError before any work starts where the input is bad."""
    data = images_of(settings)
    teacher = new_denoiser(settings, data)
    check_stable(settings, teacher, floor=-torch.inf)
    _check(settings, [settings.training])
    num_steps = settings.steps.plan[0]
    with _open(settings, cfg, directory, data) as job:
        _train_teacher(job, teacher)
        _measure_teacher(job)
        row = _finish_stage(job, "teacher", num_steps, _facts(settings.training.updates, settings.training, None))
        _time(job, [row])


def distill(settings: Distill, cfg: DictConfig, directory: Path) -> None:
    """The whole of a run, to `directory`/summary.json. Raises UserError before any work starts."""
    method = instantiate(settings.method)
    plan = method.stages(settings.steps, settings.distillation.max_teacher_steps)
    given = given_teacher(settings)
    check = getattr(method, "check", lambda teacher: None)
    if given is not None:
        check(given)
        check_sampler(method, given)
        settings.metrics.check_samplers(partial(sampler_of, given))
    _check(settings, [settings.conversion if given else settings.training, settings.guiding, settings.distillation])
    device = _trainer(settings).strategy.root_device
    data = images_of(settings, given, device)
    template = new_student(settings, data, given)
    check_stable(settings, template, floor=torch.inf if is_imported(settings.teacher) else NEARLY_ZERO_SNR)
    if given is None:
        check(template)
    converts = given is not None and given.architecture["parameterization"] != template.architecture["parameterization"]
    guides = _guides(settings, given or template)
    _check_text_to_image(settings, method, template)
    if settings.lora.rank is not None:
        lora.check(settings.lora.rank, template.network)
        if any(stage.counts for stage in plan):
            raise UserError(
                f"lora.rank={settings.lora.rank} keeps the last layer, which this method trains: leave it out"
            )
    data = encoded_for(given, data, device)
    num_steps = settings.steps.plan[0]
    with _open(settings, cfg, directory, data) as job:
        teacher = directory / "teacher"
        if given is None:
            _train_teacher(job, template)
        elif is_main() and not (teacher / "denoiser").exists():
            given.save(teacher / "denoiser", grid=num_steps)
        barrier()
        facts = _facts(0, None, None) if given else _facts(settings.training.updates, settings.training, None)
        rows = [_finish_stage(job, "teacher", num_steps, facts)]
        results = [teacher]
        if converts:
            rows.append(_convert(job, teacher))
            results = [directory / CONVERTED]
        if guides:
            rows.append(_guide(job, results[-1]))
            results = [directory / GUIDED]
        for stage in plan:
            _distill_stage(job, method, stage, results)
            facts = _facts(stage.updates, settings.distillation, results[-1].name)
            rows.append(_finish_stage(job, stage.name, stage.num_steps, facts))
            results.append(directory / stage.name)
            rows += [_finish_fused(job, results[-1], count) for count in stage.counts]
        _measure_teacher(job)
        rows = _time(job, rows)
        if is_main():
            page.comparison_sheet(directory, rows)
            _draw_neighbours(job, rows[-1])
            log_summary(job.loggers, rows, directory / "comparison.png")
            page.write([directory], directory / "report.html")
            write_json(directory / "summary.json", rows)


def _check_text_to_image(settings: Distill, method: Any, teacher: Denoiser) -> None:
    """Refuses students that diffusers' pipeline does not draw with, and steps between times that are the same."""
    if teacher.codec is None or not isinstance(teacher.schedule, DiscreteBetaSchedule):
        return
    if sampler_taught(method) != DDIM:
        raise UserError(
            f"teacher={settings.teacher} makes images from text, and its students are drawn by a pipeline which "
            f"has no sampler {sampler_taught(method)}: use method.stochastic=false"
        )
    steps, known = max(*settings.steps.plan, *getattr(method, "range", ())), len(teacher.schedule.alphas_cumprod)
    if steps > known:
        raise UserError(
            f"steps.plan or the method asks for {steps} steps, and the teacher knows {known} times: use no more, with "
            f"method=multistep_consistency method.teacher_steps_to={known}"
        )


def _check(settings: Train, sections: list[Optimization]) -> None:
    """Batches that divide among the devices, metrics that can be measured, and a trainer that this machine can run."""
    settings.metrics.check_samplers()
    trainer = _trainer(settings)
    least, most = trainer.accumulate_grad_batches, settings.max_batch_per_device
    for section in sections:
        accumulated_batches(section.batch_size, trainer.world_size, least, most, f"{section.section}.batch_size")


def _trainer(settings: Train) -> Trainer:
    """A Trainer that fits nothing: it tells of the devices. Raises UserError where this machine cannot run it."""
    try:
        with quietly():
            return instantiate(settings.trainer, logger=False, enable_checkpointing=False, enable_model_summary=False)
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"trainer: {' '.join(str(cause).split())}") from error


@contextmanager
def _open(settings: Train, cfg: DictConfig, directory: Path, data: ImageSet) -> Iterator[Job]:
    """Everything that a run holds open, closed again whatever happens; loggers are told how it ended."""
    fid = None
    if settings.metrics.extractor is not None:
        extractor = build(instantiate(settings.metrics.extractor), data)
        fid = FID(extractor, data, settings.metrics.num_samples, settings.seed)
    writing = run_directory.Writing(cfg, directory, data.fingerprint)
    trainer = _trainer(settings)
    start_processes(trainer)
    device = trainer.strategy.root_device
    loggers: list[Logger] = []
    try:
        loggers += [instantiate(settings.logger)] if settings.logger else []
        with closing(loggers):
            for logger in loggers:
                logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
            yield Job(settings, directory, data, fid, loggers, device)
    finally:
        writing.close()


def _is_trained(stage: Path) -> bool:
    """As the main process sees it: file systems of clusters tell the others late."""
    return of_main((stage / "denoiser").exists())


def _train_teacher(job: Job, teacher: Denoiser) -> None:
    if not _is_trained(job.directory / "teacher"):
        section = job.settings.training
        module = TeacherModule(teacher, job.recipe(section))
        _fit(job, module, "teacher", section.batch_size, (section.updates, job.settings.steps.plan[0]))


def _distill_stage(job: Job, method: Any, stage: Stage, results: list[Path]) -> None:
    """One student: it starts from the stage before, or the first from what is given, and learns from the plan's."""
    if _is_trained(job.directory / stage.name):
        return
    section = job.settings.distillation  # type: ignore[attr-defined]
    start, teacher = (Denoiser.load(results[k] / "denoiser") for k in (-1, stage.teacher))
    if stage.index == 1 and job.settings.teacher is not None and job.settings.start is not None:  # type: ignore[attr-defined]
        start = Denoiser.load(Path(job.settings.start).expanduser())
    module = DistillationModule(teacher, stage, job.recipe(section), method, start=start)
    _fit(job, module, stage.name, section.batch_size, (stage.updates, stage.num_steps))


def _finish_fused(job: Job, parallel: Path, num_steps: int) -> dict[str, Any]:
    """The student of one step count that a student of several holds. Returns its row."""
    stage = Stage(0, num_steps, 0, 1, 0)
    if is_main() and not (job.directory / stage.name / "denoiser").exists():
        Denoiser.load(parallel / "denoiser").for_steps(num_steps).save(job.directory / stage.name / "denoiser")
    barrier()
    return _finish_stage(job, stage.name, num_steps, _facts(0, None, parallel.name))


def _guides(settings: Distill, teacher: Denoiser) -> bool:
    """Whether students are to be taught guidance that the teacher has not been. Raises UserError where it cannot be."""
    if settings.guidance is None:
        return False
    if settings.start is not None and settings.teacher is not None and teacher.guidance is None:
        raise UserError(
            f"start={settings.start} is what the first student starts from, and with guidance={settings.guidance} that "
            f"is the student of the stage before: leave start out"
        )
    if teacher.guidance is not None:
        if teacher.guidance != settings.guidance_range:
            raise UserError(
                f"guidance={settings.guidance}, and teacher={settings.teacher} was taught {list(teacher.guidance)}: "
                f"leave guidance out, or give the teacher that it learned from"
            )
        return False
    if teacher.num_steps is not None:
        raise UserError(
            f"guidance={settings.guidance} is learned from a teacher that knows every time, and teacher="
            f"{settings.teacher} was distilled for {teacher.num_steps} steps: give the teacher that it came from"
        )
    if not teacher.has_null_condition:
        raise UserError(
            f"guidance={settings.guidance} needs a teacher that knows what no label means, and teacher="
            f"{settings.teacher} has no null label: give one trained with label_dropout, or, of a diffusers model, "
            f"teacher_null_label=<its last class>"
        )
    Guidance(*settings.guidance_range).begin(copy.deepcopy(teacher), Stage(0, 1, 0, 1, 0))  # a place for it
    return True


def _guide(job: Job, teacher: Path) -> dict[str, Any]:
    """The stage between a teacher and the students that are to know its guidance. Returns its row."""
    settings: Distill = job.settings  # type: ignore[assignment]
    low, high = settings.guidance_range
    method = Guidance(low, high, settings.guiding.clip)
    return _at_every_time(job, method, settings.guiding, teacher, None)


def _convert(job: Job, teacher: Path) -> dict[str, Any]:
    """The stage between a teacher and its first student, where they predict different things. Returns its row."""
    settings: Distill = job.settings  # type: ignore[assignment]
    parameterization = instantiate(settings.parameterization)
    return _at_every_time(job, Conversion(settings.conversion.clip), settings.conversion, teacher, parameterization)


def _at_every_time(
    job: Job, method: Any, section: Converting, teacher: Path, parameterization: Parameterization | None
) -> dict[str, Any]:
    """A stage whose result has no step count of its own, of the teacher's parameterization or another. Its row."""
    (stage,) = method.stages(job.settings.steps)
    stage = replace(stage, updates=section.updates or stage.updates)
    if not _is_trained(job.directory / stage.name):
        given = Denoiser.load(teacher / "denoiser")
        start = given if parameterization is None else predicting(given, parameterization)
        recipe = job.recipe(section)
        if parameterization is not None:  # too much for adapters, which begin with what it makes
            recipe = replace(recipe, lora_rank=None)
        method = replace(method, clip=method.clip and given.clips)
        module = DistillationModule(given, stage, recipe, method, start=start)
        _fit(job, module, stage.name, section.batch_size, (stage.updates, stage.num_steps))
    return _finish_stage(job, stage.name, stage.num_steps, _facts(stage.updates, section, teacher.name))


def _fit(job: Job, module: DenoisingModule, name: str, batch_size: int, counts: tuple[int, int]) -> None:
    settings, (updates, num_steps) = job.settings, counts
    data = ImageDataModule(job.data, batch_size, settings.seed, module.stage_index, settings.num_workers)
    options = FitSettings(
        directory=job.directory / name,
        prefix=metric_prefix(name),
        updates=updates,
        num_steps=num_steps,
        trainer=partial(instantiate, settings.trainer),
        loggers=job.loggers,
        callbacks=[instantiate(node) for node in (settings.callbacks or {}).values()],
        metric=job.fid,
        measure_every_n_updates=settings.metrics.every_n_updates,
        draw=partial(_draw_frame, job, num_steps),
        draw_every_n_updates=settings.samples_every_n_updates,
        checkpoint_every_n_updates=settings.checkpoint_every_n_updates,
        max_batch_per_device=settings.max_batch_per_device,
        progress_bar=settings.trainer["enable_progress_bar"],
    )
    fit(module, data, options)


def _draw_frame(job: Job, num_steps: int, denoiser: Denoiser, file: Path) -> None:
    """A column of the grid's first images, as the denoiser draws them now."""
    images = generate(denoiser, range(FRAME_IMAGES), Draw(num_steps, job.settings.seed), job.device)
    save_grid(torch.cat(list(images)).cpu(), file, nrow=1)


def _facts(updates: int, section: Optimization | None, parent: str | None) -> dict[str, Any]:
    """What a stage's row says of its training; no section: it was not trained here."""
    return {"updates": updates, "learning_rate": None if section is None else section.learning_rate, "parent": parent}


def _finish_stage(job: Job, name: str, num_steps: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Samples and measures a stage's denoiser, and writes samples.png and, last, metrics.json. Returns the row."""
    directory = job.directory / name
    found = of_main(read_json(directory / "metrics.json") if is_main() else None)
    if found is not None:
        return found
    denoiser = Denoiser.load(directory / "denoiser").to(job.device)
    row: dict[str, Any] = {"stage": name, "num_steps": num_steps}
    if job.fid is not None:
        row[job.fid.name] = job.fid.measure(denoiser, num_steps, job.device)
        row["num_samples"] = job.fid.num_samples
        row["provenance"] = job.fid.provenance(denoiser, num_steps)
    grid = _grid(job, denoiser, num_steps)
    if is_main():
        row |= {**facts, "denoiser": f"{name}/denoiser"}
        row |= dict(read_json(directory / "cost.json", {}))  # type: ignore[call-overload]  # absent for a given teacher
        row |= dict(read_json(directory / "ema.json", {}))  # type: ignore[call-overload]  # of several, the best
        save_grid(torch.stack(grid), directory / "samples.png")
        if job.settings.samples_every_n_updates and facts["updates"]:
            save_grid(torch.stack(grid[:FRAME_IMAGES]), film_of(directory, facts["updates"]), nrow=1)
        log_stage(job.loggers, metric_prefix(name), row, directory, job.directory.name)
        write_json(directory / "metrics.json", row)
    barrier()
    return row


def _grid(job: Job, denoiser: Denoiser, num_steps: int) -> list[torch.Tensor]:
    """The images (C, H, W) of samples.png, drawn by all processes together: many steps take long."""
    mine = range(rank(), GRID_IMAGES, world_size())
    drawn = generate(denoiser, mine, Draw(num_steps, job.settings.seed), job.device)
    parts = gather([image for batch in drawn for image in batch.cpu()])
    return [parts[i % len(parts)][i // len(parts)] for i in range(GRID_IMAGES)]


def _time(job: Job, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with seconds per image, measured by the main process while nothing else is done, and kept."""
    if is_main() and any("seconds_per_image" not in row for row in rows):
        denoisers = [Denoiser.load(job.directory / row["stage"] / "denoiser").to(job.device) for row in rows]
        timed = time_stages(denoisers, [row["num_steps"] for row in rows], job.device)
        for row, seconds in zip(rows, timed, strict=True):
            row |= seconds
            write_json(job.directory / row["stage"] / "metrics.json", row)
    barrier()
    return rows


def _measure_teacher(job: Job) -> None:
    """The teacher by its own samplers at the step counts of metrics.teacher_curve, to teacher/curve.json."""
    curve, fid = job.settings.metrics.teacher_curve, job.fid
    if fid is None or curve is None:
        return
    denoiser = Denoiser.load(job.directory / "teacher" / "denoiser").to(job.device)

    def measure(num_steps: int, sampler: str) -> float:
        return fid.measure(denoiser, num_steps, job.device, sampler)

    measure_teacher(
        job.directory / "teacher" / "curve.json",
        curve["steps"],
        curve["samplers"],
        measure,
        fid.provenance(denoiser, 1),
    )


def _draw_neighbours(job: Job, row: dict[str, Any]) -> None:
    """neighbours.png: has the last student memorised images?"""
    denoiser = Denoiser.load(job.directory / row["denoiser"]).to(job.device)
    drawn = generate(denoiser, range(NEIGHBOURS_OF), Draw(row["num_steps"], job.settings.seed), job.device)
    samples = torch.cat(list(drawn))
    rows = torch.cat([samples[:, None], nearest_neighbours(samples, job.data.images)], 1).transpose(0, 1)
    save_grid(rows.flatten(0, 1).cpu(), job.directory / "neighbours.png", nrow=NEIGHBOURS_OF)
