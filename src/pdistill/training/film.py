"""Metrics and pictures of a stage while it trains."""

import contextlib
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning import LightningModule, Trainer

from pdistill import display, processes
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.files import write_json
from pdistill.training import execution
from pdistill.training.callbacks import PerUpdate, TrainingLog
from pdistill.training.cost import Cost
from pdistill.training.devices import whole
from pdistill.training.logger import log_picture

FILM = "film"  # a stage's directory of what was seen while it trained, and the name of its frames in loggers


class Measure(Protocol):
    """What `MetricWhileTraining` asks of a metric, for example of `metrics.fid.FID`."""

    name: str

    def measure(self, denoiser: Denoiser, num_steps: int, device: Any) -> float: ...


def film_of(directory: Path, update: int, suffix: str = ".png") -> Path:
    """Where a stage keeps its frame (.png) after so many updates, and what was measured then (.json)."""
    return directory / FILM / f"{update:07d}{suffix}"


@dataclass(frozen=True)
class Watch:
    """Which training is looked at, and how often."""

    directory: Path
    """Of the stage."""
    prefix: str
    """Of the stage's scalars and pictures."""
    every_n_updates: int


class WhileTraining(PerUpdate):
    """Looks at the module's `result` before the first update and after every `every_n_updates`; writes a file of it.

    What is there already, of a run that was stopped, is not done again. The last update is left out: the finished stage
    is drawn and measured anyway.
    """

    suffix: str

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what the stage starts from, unless it is resumed."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self.on_update(trainer, pl_module, 0)

    def on_update(self, trainer: Any, pl_module: Any, update: int) -> None:
        file = film_of(self.watch.directory, update, self.suffix)
        if update % self.watch.every_n_updates or update == trainer.max_steps or processes.of_main(file.exists()):
            return
        start, denoiser = time.perf_counter(), pl_module.result
        training = denoiser.training
        with execution.paused(pl_module.recipe.execution):
            self.look(trainer, whole(trainer, denoiser).eval(), update, file)
        denoiser.train(training)
        seconds = time.perf_counter() - start
        for callback in trainer.callbacks:  # whose seconds are of training
            if isinstance(callback, TrainingLog):
                callback.since += seconds
            elif isinstance(callback, Cost):
                callback.clock += seconds

    @abstractmethod
    def look(self, trainer: Any, denoiser: Denoiser, update: int, file: Path) -> None:
        """Writes `file`, whole or not at all. All processes call it; only the main one may write and log."""


class MetricWhileTraining(WhileTraining):
    """Measures at `num_steps`, and logs it as `prefix`/`metric.name`; all processes take part."""

    suffix = ".json"

    def __init__(self, watch: Watch, metric: Measure, num_steps: int) -> None:
        super().__init__(watch)
        self.metric = metric
        self.num_steps = num_steps

    def look(self, trainer: Any, denoiser: Denoiser, update: int, file: Path) -> None:
        value = self.metric.measure(denoiser, self.num_steps, trainer.strategy.root_device)
        display.tell(metric=(self.metric.name, value))
        if processes.is_main():
            for logger in trainer.loggers:
                logger.log_metrics({f"{self.watch.prefix}/{self.metric.name}": value}, step=update)
            write_json(file, {self.metric.name: value})


class Film(WhileTraining):
    """Draws a frame by `draw(denoiser, file)`, and shows it to the loggers as `prefix`/film; the main process alone."""

    suffix = ".png"

    def __init__(self, watch: Watch, draw: Callable[[Denoiser, Path], None]) -> None:
        super().__init__(watch)
        self.draw = draw

    def look(self, trainer: Any, denoiser: Denoiser, update: int, file: Path) -> None:
        if processes.is_main():
            with contextlib.suppress(UserError):  # samples that are not finite: the loss tells, and all processes
                self.draw(denoiser, file)
                log_picture(trainer.loggers, f"{self.watch.prefix}/{FILM}", file, step=update)
