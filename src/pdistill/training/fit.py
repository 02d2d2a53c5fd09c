"""One stage: one Lightning fit, from its checkpoint if there is one, to the denoiser on disk."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.loggers import Logger

from pdistill import processes
from pdistill.dataset import ImageSet
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.faults import in_words
from pdistill.files import remove_partial, write_json
from pdistill.training import checkpoint, devices, execution
from pdistill.training.callbacks import ResumableCheckpoint, TrainingLog
from pdistill.training.cost import Cost
from pdistill.training.data import ImageDataModule
from pdistill.training.film import Film, Measure, MetricWhileTraining, Watch
from pdistill.training.module import DenoisingModule
from pdistill.training.progress import ProgressBar


@dataclass(frozen=True)
class FitSettings:
    """How a stage is run; what it trains is in its modules."""

    directory: Path
    """Of the stage. It gets film/, last.ckpt and previous.ckpt while it trains, then cost.json, ema.json if there were
    several EMAs, and, last, denoiser/."""
    prefix: str = ""
    """Of the stage's scalars, and the name of its bar: "teacher", "steps_0016"; by default that of the directory."""
    updates: int = 0
    """Of the weights; 0: as many as the module was made for."""
    num_steps: int = 0
    """Steps that the result is sampled with: of its diffusers pipeline, and of the metric while it trains; 0: the
    student's own. A teacher has none: to measure it while it trains, give them."""
    trainer: Callable[..., Trainer] = Trainer
    """Makes a Trainer; with `functools.partial`, its devices, precision, `accumulate_grad_batches` and so on."""
    loggers: Sequence[Logger] = ()
    """Get the scalars."""
    callbacks: Sequence[Callback] = ()
    """Further callbacks, made again for each stage: what one remembers of a stage must not depend on a restart."""
    metric: Measure | None = None
    """Measured while the stage trains, and chooses among several EMAs, for example a `metrics.fid.FID`."""
    measure_every_n_updates: int | None = None
    """Updates between two measurements; None for none."""
    draw: Callable[[Denoiser, Path], None] | None = None
    """Draws a frame of the stage's film: a few samples of the denoiser, to a .png file."""
    draw_every_n_updates: int | None = None
    """Updates between two frames; None for none."""
    checkpoint_every_n_updates: int = 250
    """Updates that a crash may cost at most."""
    max_batch_per_device: int | None = None
    """More images than this are taken in several parts, their gradients added up; None: no limit."""
    progress_bar: bool = True
    """Whether a bar counts the updates, unless one of Lightning's is among the callbacks."""


def fit(module: DenoisingModule, data: ImageDataModule | ImageSet, settings: FitSettings) -> Denoiser:
    """Trains one stage to `settings.directory`/denoiser, starting from where a stopped one left it. Returns its result.

    A dataset is taken in batches as the module's recipe says. Every process calls it, and all leave it together. Raises
    UserError for a batch that the devices cannot share, losses that are not finite, checkpoints that are damaged, and
    settings that do not say what the module does not; Interrupted where a signal stopped it and the checkpoint is
    written.
    """
    settings = filled(settings, module)
    if isinstance(data, ImageSet):
        recipe = module.recipe
        data = ImageDataModule(data, recipe.settings.batch_size, recipe.seed, module.stage_index)
    check_choice(len(module.decays), settings.metric is not None)
    directory = settings.directory
    path = directory / checkpoint.LAST
    log, cost = TrainingLog(settings.prefix, data.batch_size, module.recipe.skips), Cost(data.batch_size)
    callbacks: list[Callback] = [log, cost, checkpoint.Batching(), *settings.callbacks]
    if settings.metric is not None and settings.measure_every_n_updates:
        watch = Watch(directory, settings.prefix, settings.measure_every_n_updates)
        callbacks.append(MetricWhileTraining(watch, settings.metric, settings.num_steps))
    if settings.draw is not None and settings.draw_every_n_updates:
        callbacks.append(Film(Watch(directory, settings.prefix, settings.draw_every_n_updates), settings.draw))
    if settings.progress_bar and not any(isinstance(callback, LightningBar) for callback in settings.callbacks):
        callbacks.append(ProgressBar(settings.prefix))
    callbacks.append(ResumableCheckpoint(path, settings.checkpoint_every_n_updates, log))
    with quietly():
        trainer = make_trainer(settings, callbacks=callbacks, max_steps=settings.updates)
        trainer.accumulate_grad_batches = accumulated_batches(
            data.batch_size, trainer.world_size, trainer.accumulate_grad_batches, settings.max_batch_per_device
        )
        start_processes(trainer)
        if processes.is_main():
            directory.mkdir(parents=True, exist_ok=True)
            remove_partial(directory)
        resumes = checkpoint.there_is_one(directory)
        running = execution.running(module, mixed="mixed" in str(trainer.precision))
        with in_words(settings.prefix, _smaller(data.batch_size, trainer)), running:
            trainer.fit(module, data, ckpt_path=str(path) if resumes else None, weights_only=True)
    choice = choose_ema(module, settings, trainer) if len(module.emas) > 1 else None
    result = devices.whole(trainer, module.result).cpu()
    if processes.is_main():
        if choice is not None:
            write_json(directory / "ema.json", choice)
        write_json(directory / "cost.json", cost.spent | {"training_images": settings.updates * data.batch_size})
        result.save(directory / "denoiser", grid=settings.num_steps)
        checkpoint.WholeCheckpoints().remove_checkpoint(path)
    processes.barrier()
    return result.eval()


def filled(settings: FitSettings, module: DenoisingModule) -> FitSettings:
    """The settings with what the module tells, where they leave it out. Raises UserError for what neither tells."""
    full = replace(
        settings,
        prefix=settings.prefix or settings.directory.name.replace("-", "_"),
        updates=settings.updates or module.updates,
        num_steps=settings.num_steps or module.denoiser.num_steps or 0,
    )
    if not full.updates:
        raise UserError(f"the training of {full.prefix} has no number of updates: give FitSettings(updates=...)")
    if full.metric is not None and not full.num_steps:
        raise UserError(f"{full.prefix} has no step count to be measured at: give FitSettings(num_steps=...)")
    return full


def _smaller(batch_size: int, trainer: Trainer) -> str:
    """What to do where the memory does not suffice."""
    images = batch_size // (trainer.world_size * trainer.accumulate_grad_batches)
    advice = (
        f"max_batch_per_device={images // 2} takes its {images} images in parts" if images > 1 else "a batch is one"
    )
    return (
        f"{advice}{', and adds their gradients up' * (images > 1)}; gradient checkpointing, a smaller network or "
        f"another precision need less, too. The same command continues from the last checkpoint"
    )


def check_choice(emas: int, measures: bool) -> None:
    """Raises UserError where there are several EMAs to choose from, and no metric to choose by."""
    if emas > 1 and not measures:
        raise UserError(
            "distillation.ema_decays chooses the best of several by the metric, and metrics=none measures nothing: "
            "choose metrics, or give one decay"
        )


def choose_ema(module: DenoisingModule, settings: FitSettings, trainer: Trainer) -> dict[str, Any]:
    """Makes the best of several EMAs the module's result; equal ones: the first. Says so, and returns the metrics.

    Each is measured at `settings.num_steps`, with the samples that the finished stage is measured with. All processes
    call it and choose alike.
    """
    metric, device = settings.metric, trainer.strategy.root_device
    assert metric is not None  # `check_choice`
    values = []
    for ema in module.emas:
        candidate = devices.whole(trainer, ema).to(device).eval()
        values.append(metric.measure(candidate, settings.num_steps, device))
        candidate.cpu()  # where the trainer has left the module
    values = processes.of_main(values)
    module.chosen = min(range(len(values)), key=values.__getitem__)
    decay = module.decays[module.chosen]
    candidates = [{"ema_decay": d, metric.name: v} for d, v in zip(module.decays, values, strict=True)]
    if processes.is_main():
        listed = ", ".join(f"{d:g}: {v:.4g}" for d, v in zip(module.decays, values, strict=True))
        print(f"{settings.prefix}: the EMA of decay {decay:g} is kept ({metric.name} by decay: {listed})")
    return {"ema_decay": decay, "ema_candidates": candidates}


def make_trainer(settings: FitSettings, **options: Any) -> Trainer:
    """A Trainer without Lightning's own checkpoints, samplers and summaries, which writes checkpoints whole."""
    given = settings.trainer.keywords if isinstance(settings.trainer, partial) else {}
    plugins = given.get("plugins") or []
    return settings.trainer(
        logger=list(settings.loggers),
        plugins=[*(plugins if isinstance(plugins, list | tuple) else [plugins]), checkpoint.WholeCheckpoints()],
        enable_progress_bar=settings.progress_bar,
        enable_checkpointing=True,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        max_epochs=-1,
        default_root_dir=str(settings.directory),
        **options,
    )


def start_processes(trainer: Trainer) -> None:
    """Starts the other processes of a trainer with several devices, unless they are there, and lets all of them meet.

    From then on `pdistill.processes` knows every rank. Calling it again does nothing.
    """
    if trainer.world_size == 1 or processes.world_size() > 1:
        return
    if trainer.strategy.root_device.type == "cpu":
        processes.keep_memory()
    launcher = trainer.strategy.launcher
    if launcher is None:
        trainer.strategy.setup_environment()
    else:
        launcher.launch(trainer.strategy.setup_environment)
        processes.remember_started(launcher)
        _leave_the_dead_to_us()
        processes.watch(getattr(launcher, "procs", []))


def _leave_the_dead_to_us() -> None:
    """Lightning's observer of its processes kills the others without a word where one has died: it gets none to see."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def accumulated_batches(
    batch_size: int, devices: int, least: int = 1, most_images: int | None = None, key: str = "batch_size"
) -> int:
    """How many batches' gradients each device adds up, so that all of them make one batch of `batch_size`.

    The fewest, but not below `least`, that give equal parts of at most `most_images`. Raises UserError, which names
    `key`, where the batch cannot be divided so.
    """
    per_device, rest = divmod(batch_size, devices * least)
    if rest:
        raise UserError(
            f"{key}={batch_size} cannot be divided into {devices * least} equal parts (devices times accumulated "
            f"batches): use a multiple of {devices * least}"
        )
    most = most_images or per_device
    return least * next(k for k in range(1, per_device + 1) if per_device % k == 0 and per_device // k <= most)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Lightning's hints on loaders and workers, which do not fit this use, and its lines on devices."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
