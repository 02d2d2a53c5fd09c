"""Runs a plan stage by stage, and resumes it: what is finished is on disk, and is not done again.

outputs/<name>/teacher/ and outputs/<name>/steps-NNNN/ each end up with `denoiser/`, `samples.png` and
`metrics.json`, written in this order; while a stage trains, `last.ckpt` is what it resumes from.
"""

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from pdistill import curve, report, run
from pdistill.dataset.batches import ImageDataModule
from pdistill.training.callbacks import FID, Cost, ProgressBar, ResumableCheckpoint, TrainingLog
from pdistill.commands.checks import accumulated_batches, check_settings, check_stable, check_teacher
from pdistill.dataset import ImageSet
from pdistill.denoiser import Denoiser
from pdistill.files import write_json
from pdistill.training.distillation import DistillationModule
from pdistill.errors import UserError
from pdistill.training.logger import close, log_stage, log_summary
from pdistill.metrics.reference import generate, provenance
from pdistill.network import set_dropout
from pdistill.report.grids import nearest_neighbours, save_grid
from pdistill.randomness import sample_noise, seed_of
from pdistill.sampling import sample
from pdistill.steps import Stage, stages
from pdistill.training.teacher import TeacherModule

GRID_IMAGES = 64
NEIGHBOURS_OF = 12  # samples

warnings.filterwarnings("ignore", module="lightning")  # hints on loaders and workers that do not fit this use
warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # which devices there are, tips, why a fit ended


@dataclass
class Job:
    """What every stage of a run shares."""

    cfg: DictConfig
    directory: Path
    data: ImageSet
    fid: FID | None
    loggers: list[Logger]

    def trainer(self, **options) -> Trainer:
        return instantiate(
            self.cfg.trainer,
            logger=self.loggers,
            enable_checkpointing="callbacks" in options,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            max_epochs=-1,
            default_root_dir=str(self.directory),
            **options,
        )


def train(cfg: DictConfig, directory: Path) -> None:
    """A teacher, in `directory`/teacher. Raises UserError before any work starts where the input is bad."""
    check_settings(cfg)
    data = instantiate(cfg.dataset)
    plan = list(cfg.steps.plan)
    stages(plan, cfg.steps.updates, cfg.steps.updates_last_two)
    teacher = new_denoiser(cfg, data)
    with open_job(cfg, directory, data) as job:
        _train_teacher(job, teacher)
        _measure_teacher(job)
        _finish_stage(job, "teacher", plan[0], updates=cfg.training.updates)


def distill(cfg: DictConfig, directory: Path) -> None:
    """The whole of a run, to `directory`/summary.json. Raises UserError before any work starts."""
    check_settings(cfg)
    data = instantiate(cfg.dataset)
    updates = cfg.steps.updates, cfg.steps.updates_last_two
    plan = stages(list(cfg.steps.plan), *updates, cfg.distillation.max_teacher_steps)
    template = new_denoiser(cfg, data)
    check_stable(cfg, template)
    given = Denoiser.load(cfg.teacher) if cfg.teacher else None
    if given is not None:
        check_teacher(cfg, template, given)
    with open_job(cfg, directory, data) as job:
        teacher = directory / "teacher"
        if given is None:
            _train_teacher(job, template)
        elif run.is_main_process() and not (teacher / "denoiser").exists():
            given.save(teacher / "denoiser", grid=cfg.steps.plan[0])
        rows = [_finish_stage(job, "teacher", cfg.steps.plan[0], updates=0 if given else cfg.training.updates)]
        results = [teacher]
        for stage in plan:
            _distill_stage(job, stage, start=results[-1], teacher=results[stage.teacher])
            rows.append(_finish_stage(job, stage.name, stage.num_steps, stage.updates, parent=results[-1].name))
            results.append(directory / stage.name)
        _measure_teacher(job)
        if run.is_main_process():
            report.comparison_sheet(directory, rows)
            _draw_neighbours(job, results[-1], plan[-1].num_steps)
            log_summary(job.loggers, rows, directory / "comparison.png")
            report.write([directory], directory / "report.html")
            write_json(directory / "summary.json", rows)


def new_denoiser(cfg: DictConfig, data: ImageSet) -> Denoiser:
    """An untrained denoiser of the configured kind that fits the data; its weights depend on the seed alone."""
    parameterization, schedule = instantiate(cfg.parameterization), instantiate(cfg.schedule)
    channels, height, _ = data.image_shape
    if cfg.conditional and data.labels is None:
        raise UserError(f"conditional=true needs labels, and {data.name} has none: one sub-folder for each class")
    torch.manual_seed(seed_of(cfg.seed))
    num_classes = data.num_classes if cfg.conditional else None
    network = instantiate(cfg.network)(
        image_size=height,
        image_channels=channels,
        out_channels=parameterization.channels(channels),
        num_classes=num_classes + 1 if cfg.label_dropout else num_classes,
    )
    return Denoiser(network, parameterization, schedule, null_label=num_classes if cfg.label_dropout else None)


@contextmanager
def open_job(cfg: DictConfig, directory: Path, data: ImageSet) -> Iterator[Job]:
    """The extractor, the run directory, and the loggers, which are closed whatever happens."""
    fid = None
    if cfg.metrics.extractor is not None:
        extractor = instantiate(cfg.metrics.extractor)(data)
        fid = FID(extractor, data, cfg.metrics.num_samples, cfg.seed, every_n_updates=cfg.metrics.every_n_updates)
    run.open_directory(cfg, directory)
    loggers = [instantiate(cfg.logger)] if cfg.logger else []
    try:
        for logger in loggers:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        yield Job(cfg, directory, data, fid, loggers)
    finally:
        close(loggers)


def _train_teacher(job: Job, teacher: Denoiser) -> None:
    directory, cfg = job.directory / "teacher", job.cfg.training
    if (directory / "denoiser").exists():
        return
    set_dropout(teacher.network, cfg.dropout)
    module = TeacherModule(
        teacher.train(),
        instantiate(job.cfg.weighting),
        **_optimization(job.cfg, cfg),
        stage=0,
        warmup_updates=cfg.warmup_updates,
    )
    _fit(job, module, directory, "teacher", cfg.batch_size, cfg.updates, job.cfg.steps.plan[0])


def _measure_teacher(job: Job) -> None:
    """The teacher by its own samplers at the step counts of metrics.teacher_curve, to teacher/curve.json."""
    settings = job.cfg.metrics.teacher_curve
    if job.fid is None or settings is None:
        return
    device = job.trainer().strategy.root_device
    denoiser = Denoiser.load(job.directory / "teacher" / "denoiser").to(device)
    curve.measure_teacher(
        job.directory / "teacher" / "curve.json",
        settings.steps,
        settings.samplers,
        lambda num_steps, sampler: job.fid.measure(denoiser, num_steps, device, sampler),
        writes=run.is_main_process(),
    )


def _optimization(cfg: DictConfig, section: DictConfig) -> dict:
    """What `training` and `distillation` configure alike, and what they share."""
    alike = {k: section[k] for k in ("learning_rate", "weight_decay", "gradient_clip", "ema_decay")}
    return alike | {"seed": cfg.seed, "label_dropout": cfg.label_dropout}


def _distill_stage(job: Job, stage: Stage, start: Path, teacher: Path) -> None:
    directory, cfg = job.directory / stage.name, job.cfg.distillation
    if (directory / "denoiser").exists():
        return
    module = DistillationModule(
        Denoiser.load(teacher / "denoiser"),
        stage.num_steps,
        instantiate(job.cfg.weighting),
        **_optimization(job.cfg, cfg),
        stage=stage.index,
        updates=stage.updates,
        teacher_steps=stage.teacher_steps,
        dropout=cfg.dropout,
        start=Denoiser.load(start / "denoiser"),
    )
    _fit(job, module, directory, metric_prefix(stage.name), cfg.batch_size, stage.updates, stage.num_steps)


def metric_prefix(stage_name: str) -> str:
    """ "steps-0016" -> "steps_0016", the name under which its scalars are logged."""
    return stage_name.replace("-", "_")


def _fit(
    job: Job, module: LightningModule, directory: Path, prefix: str, batch_size: int, updates: int, num_steps: int
) -> None:
    """One Lightning fit, from the stage's checkpoint if there is one, to `directory`/denoiser."""
    directory.mkdir(exist_ok=True)
    checkpoint = directory / "last.ckpt"
    log, cost = TrainingLog(prefix, batch_size), Cost()
    callbacks = [log, cost, ResumableCheckpoint(checkpoint, job.cfg.checkpoint_every_n_updates, log)]
    if job.fid is not None:
        job.fid.prefix, job.fid.num_steps = prefix, num_steps
        callbacks.append(job.fid)
    if job.cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar(prefix))
    trainer = job.trainer(max_steps=updates, callbacks=callbacks)
    trainer.accumulate_grad_batches = accumulated_batches(job.cfg, batch_size)
    data = ImageDataModule(job.data, batch_size, job.cfg.seed, module.stage, job.cfg.num_workers)
    if checkpoint.exists():
        _check_readable(checkpoint)
    trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint.exists() else None, weights_only=True)
    if trainer.is_global_zero:
        write_json(directory / "cost.json", cost.spent | {"training_images": updates * batch_size})
        module.result.save(directory / "denoiser", grid=num_steps)
        checkpoint.unlink(missing_ok=True)
    trainer.strategy.barrier()


def _check_readable(checkpoint: Path) -> None:
    try:
        torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{checkpoint} is damaged ({str(error).splitlines()[0]}): delete it to start this stage anew; "
            f"finished stages are kept"
        ) from error


def _finish_stage(job: Job, name: str, num_steps: int, updates: int, parent: str | None = None) -> dict:
    """Samples and measures a stage's denoiser, and writes samples.png and, last, metrics.json. Returns the row."""
    directory = job.directory / name
    if (directory / "metrics.json").exists():
        return json.loads((directory / "metrics.json").read_text())
    trainer = job.trainer()
    device = trainer.strategy.root_device
    denoiser = Denoiser.load(directory / "denoiser").to(device)
    row = {"stage": name, "num_steps": num_steps}
    if job.fid is not None:
        row[job.fid.name] = job.fid.measure(denoiser, num_steps, device)
        row["num_samples"] = job.fid.num_samples
        row["provenance"] = provenance(
            job.fid.extractor, job.data, job.fid.num_samples, job.cfg.seed, num_steps, "ddim"
        )
    if run.is_main_process():
        row["seconds_per_image"] = seconds_per_image(denoiser, num_steps, device)
        row |= {"updates": updates, "parent": parent, "denoiser": f"{name}/denoiser"}
        cost = directory / "cost.json"  # absent where the teacher was given
        row |= json.loads(cost.read_text()) if cost.exists() else {}
        grid = generate(denoiser, range(GRID_IMAGES), num_steps, job.cfg.seed, device=device)
        save_grid(torch.cat(list(grid)).cpu(), directory / "samples.png")
        log_stage(job.loggers, metric_prefix(name), row, directory, job.directory.name)
        write_json(directory / "metrics.json", row)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return row


def _draw_neighbours(job: Job, stage: Path, num_steps: int) -> None:
    """neighbours.png: has the last student learnt images by heart?"""
    device = job.trainer().strategy.root_device
    denoiser = Denoiser.load(stage / "denoiser").to(device)
    samples = torch.cat(list(generate(denoiser, range(NEIGHBOURS_OF), num_steps, job.cfg.seed, device=device)))
    rows = torch.cat([samples[:, None], nearest_neighbours(samples, job.data.images)], 1).transpose(0, 1)
    save_grid(rows.flatten(0, 1).cpu(), job.directory / "neighbours.png", nrow=NEIGHBOURS_OF)


def seconds_per_image(denoiser: Denoiser, num_steps: int, device: torch.device, batch_size: int = 64) -> float:
    """The fastest of three rounds of sampling a batch."""
    noise = sample_noise(0, range(batch_size), denoiser.image_shape).to(device)
    label = None if denoiser.num_classes is None else torch.zeros(batch_size, dtype=torch.long, device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        sample(denoiser, noise, num_steps, label).sum().item()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / batch_size
