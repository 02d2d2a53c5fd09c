"""Runs a plan stage by stage, and resumes it: what is finished is on disk, and is not done again.

<run>/teacher/ and <run>/steps-NNNN/ each end up with `denoiser/`, `samples.png` and `metrics.json`, written in this
order; while a stage trains, `last.ckpt` is what it resumes from.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from pdistill import display
from pdistill.bars import bar
from pdistill.commands import announce
from pdistill.commands.denoisers import check_stable, new_denoiser
from pdistill.commands.job import GRID_IMAGES, Job, opened
from pdistill.commands.preflight import check_batches, planned
from pdistill.commands.settings import Distill, Train
from pdistill.commands.teachers import images_of, predicting
from pdistill.commands.timing import time_stages
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.files import read_json, write_json
from pdistill.generation import Draw, generate
from pdistill.method.conversion import Conversion
from pdistill.method.guidance import Guidance
from pdistill.metrics.curve import measure_teacher
from pdistill.parameterization import Parameterization
from pdistill.processes import barrier, gather, is_main, of_main, rank, world_size
from pdistill.report import page, plots
from pdistill.report.grids import nearest_neighbours, save_grid
from pdistill.report.runs import is_row
from pdistill.steps import CONVERTED, GUIDED, Stage
from pdistill.training import execution
from pdistill.training.data import ImageDataModule
from pdistill.training.distillation import DistillationModule
from pdistill.training.film import film_of
from pdistill.training.fit import FitSettings, fit
from pdistill.training.logger import log_stage, log_summary, metric_prefix
from pdistill.training.module import DenoisingModule
from pdistill.training.settings import Conversion as Converting
from pdistill.training.settings import Optimization
from pdistill.training.teacher import TeacherModule

FRAME_IMAGES = 4  # the first of the grid
NEIGHBOURS_OF = 12  # samples


def train(settings: Train, cfg: DictConfig, directory: Path) -> None:
    """A teacher, in `directory`/teacher. Raises UserError before any work starts where the input is bad."""
    data = images_of(settings)
    teacher = new_denoiser(settings, data)
    check_stable(settings, teacher, floor=-torch.inf)
    check_batches(settings, [settings.training])
    execution.check(settings, teacher.network)
    num_steps = settings.steps.plan[0]
    with opened(settings, cfg, directory, data) as job, announce.of_training(job, teacher):
        _train_teacher(job, teacher)
        _measure_teacher(job, "teacher")
        row = _finish_stage(job, "teacher", num_steps, _facts(settings.training.updates, settings.training, None))
        _time(job, [row])


def distill(settings: Distill, cfg: DictConfig, directory: Path) -> None:
    """The whole of a run, to `directory`/summary.json. Raises UserError before any work starts."""
    plan = planned(settings)
    given, num_steps = plan.given, settings.steps.plan[0]
    with opened(settings, cfg, directory, plan.data) as job, announce.of_distillation(job, plan):
        teacher = directory / "teacher"
        if given is None:
            _train_teacher(job, plan.template)
        elif is_main() and not (teacher / "denoiser").exists():
            given.save(teacher / "denoiser", grid=num_steps)
        barrier()
        facts = _facts(0, None, None) if given else _facts(settings.training.updates, settings.training, None)
        rows = [_finish_stage(job, "teacher", num_steps, facts)]
        results = [teacher]
        if plan.converts:
            rows.append(_convert(job, teacher))
            results = [directory / CONVERTED]
        if plan.guides:
            rows.append(_guide(job, results[-1]))
            results = [directory / GUIDED]
        for stage in plan.stages:
            _distill_stage(job, plan.method, stage, results)
            facts = _facts(stage.updates, settings.distillation, results[-1].name)
            rows.append(_finish_stage(job, stage.name, stage.num_steps, facts))
            results.append(directory / stage.name)
            rows += [_finish_fused(job, results[-1], count) for count in stage.counts]
        _measure_teacher(job, display.AFTERWARDS)
        rows = _time(job, rows)
        display.begin(display.AFTERWARDS, display.EXPORTING)
        if is_main():
            writing = [
                partial(plots.comparison_sheet, directory, rows),
                partial(_draw_neighbours, job, rows[-1]),
                partial(log_summary, job.loggers, rows, directory / "comparison.png"),
                partial(page.write, [directory], directory / "report.html"),
                partial(write_json, directory / "summary.json", rows),
            ]
            for write in bar(writing, "the report", unit="file", phase=display.EXPORTING):
                write()


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


def _guide(job: Job, teacher: Path) -> dict[str, Any]:
    """The stage between a teacher and the students that are to know its guidance. Returns its row."""
    settings: Distill = job.settings  # type: ignore[assignment]
    low, high = settings.guidance_range
    method = Guidance(low, high, clip=settings.guiding.clip)
    return _at_every_time(job, method, settings.guiding, teacher, None)


def _convert(job: Job, teacher: Path) -> dict[str, Any]:
    """The stage between a teacher and its first student, where they predict different things. Returns its row."""
    settings: Distill = job.settings  # type: ignore[assignment]
    parameterization = instantiate(settings.parameterization)
    return _at_every_time(
        job, Conversion(clip=settings.conversion.clip), settings.conversion, teacher, parameterization
    )


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
    display.begin(name, display.TRAINING)
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
        if not is_row(found) or found["stage"] != name or found["num_steps"] != num_steps:
            raise UserError(f"{directory / 'metrics.json'} is no row of {name}: delete it and run the command again")
        display.finished(name, _metric_of(job, found), was_done=True)
        return found
    denoiser = Denoiser.load(directory / "denoiser").to(job.device)
    row: dict[str, Any] = {"stage": name, "num_steps": num_steps}
    if job.fid is not None:
        display.begin(name, display.MEASURING)
        row[job.fid.name] = job.fid.measure(denoiser, num_steps, job.device)
        row["num_samples"] = job.fid.num_samples
        row["provenance"] = job.fid.provenance(denoiser, num_steps)
    display.begin(name, display.SAMPLING)
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
    display.finished(name, _metric_of(job, row), was_done=False)
    barrier()
    return row


def _metric_of(job: Job, row: dict[str, Any]) -> tuple[str, float] | None:
    return None if job.fid is None or job.fid.name not in row else (job.fid.name, row[job.fid.name])


def _grid(job: Job, denoiser: Denoiser, num_steps: int) -> list[torch.Tensor]:
    """The images (C, H, W) of samples.png, drawn by all processes together: many steps take long."""
    mine = range(rank(), GRID_IMAGES, world_size())
    drawn = generate(denoiser, mine, Draw(num_steps, job.settings.seed), job.device)
    parts = gather([image for batch in drawn for image in batch.cpu()])
    return [parts[i % len(parts)][i // len(parts)] for i in range(GRID_IMAGES)]


def _time(job: Job, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with seconds per image, measured by the main process while nothing else is done, and kept."""
    if is_main() and any("seconds_per_image" not in row for row in rows):
        display.begin(display.AFTERWARDS, display.MEASURING)
        denoisers = [Denoiser.load(job.directory / row["stage"] / "denoiser").to(job.device) for row in rows]
        timed = time_stages(denoisers, [row["num_steps"] for row in rows], job.device)
        for row, seconds in zip(rows, timed, strict=True):
            row |= seconds
            write_json(job.directory / row["stage"] / "metrics.json", row)
    barrier()
    return rows


def _measure_teacher(job: Job, stage: str) -> None:
    """The teacher by its own samplers at the step counts of metrics.teacher_curve, to teacher/curve.json."""
    curve, fid = job.settings.metrics.teacher_curve, job.fid
    if fid is None or curve is None:
        return
    denoiser = Denoiser.load(job.directory / "teacher" / "denoiser").to(job.device)

    def measure(num_steps: int, sampler: str) -> float:
        display.begin(stage, display.MEASURING)
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
    denoiser = Denoiser.load(job.directory / row["stage"] / "denoiser").to(job.device)
    drawn = generate(denoiser, range(NEIGHBOURS_OF), Draw(row["num_steps"], job.settings.seed), job.device)
    samples = torch.cat(list(drawn))
    rows = torch.cat([samples[:, None], nearest_neighbours(samples, job.data.images)], 1).transpose(0, 1)
    save_grid(rows.flatten(0, 1).cpu(), job.directory / "neighbours.png", nrow=NEIGHBOURS_OF)
