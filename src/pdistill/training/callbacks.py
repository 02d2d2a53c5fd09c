"""Lightning callbacks: what is logged, when training is kept or stopped, metrics and pictures while it runs."""

import contextlib
import signal
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from pdistill import processes
from pdistill.denoiser import Denoiser
from pdistill.errors import Interrupted, UserError
from pdistill.files import write_json
from pdistill.training.logger import log_picture

LOGSNR_EDGES = (-15.0, -10.0, -5.0, 0.0, 5.0, 10.0, 15.0)  # eight bins over [-20, 20]
SECONDS_TO_STOP = 5.0  # after which a signal to one of several processes is known to all
FILM = "film"  # a stage's directory of what was seen while it trained, and the name of its frames in loggers


def bin_name(k: int) -> str:
    """The k-th logsnr bin in words: "-20_-15", ..., "15_20"."""
    return f"{-20 + 5 * k}_{-15 + 5 * k}"


class PerUpdate(Callback):
    """Calls `on_update` after each update of the weights: with accumulated gradients, not after every batch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts from the update that the checkpoint stood at."""
        self.last_update = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Calls `on_update` if the batch was the last of its update."""
        if trainer.global_step != self.last_update:
            self.last_update = trainer.global_step
            self.on_update(trainer, pl_module, trainer.global_step)

    @abstractmethod
    def on_update(self, trainer: Any, pl_module: Any, update: int) -> None:
        """After update `update`, counted from 1. Any: not all that a Trainer has is declared."""


class TrainingLog(PerUpdate):
    """Logs loss, its mean in eight bins of logsnr, gradient norm, learning rate and images/s under `prefix`/.

    Stops the training with a UserError at the first loss or gradient that is not finite. Everything is summed up on the
    device and read once every `log_every_n_steps` updates, when the sums of all processes are joined; on a single CPU,
    where reading is free, losses are looked at in each update.
    """

    def __init__(self, prefix: str, images_per_update: int) -> None:
        self.prefix = prefix
        self.images_per_update = images_per_update

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts with empty sums."""
        super().on_train_start(trainer, pl_module)
        self.edges = torch.tensor(LOGSNR_EDGES, device=pl_module.device)
        self.first_bad = torch.full((9,), torch.inf, device=pl_module.device)  # update per bin, and for the gradient
        self._reset(pl_module)

    def _reset(self, pl_module: LightningModule) -> None:
        self.loss_sum, self.count = (torch.zeros(8, device=pl_module.device) for _ in range(2))
        self.updates, self.since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the batch's losses to the sums of their bins."""
        losses, logsnr = outputs["losses"], outputs["logsnr"]
        bins = torch.bucketize(logsnr.clamp(-20, 20).to(self.edges.dtype), self.edges)
        self.loss_sum.index_add_(0, bins, losses.float())
        self.count.index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_update(self, trainer: Any, pl_module: Any, update: int) -> None:
        self.updates += 1
        gradient = pl_module.gradient_norm
        if pl_module.loss_scaler is not None:  # which looks for a scale that overflows seldom
            gradient = torch.zeros_like(gradient)
        bad = torch.cat([self.loss_sum, gradient[None]]).isfinite().logical_not()
        self.first_bad = torch.where(bad, self.first_bad.clamp(max=update), self.first_bad)
        logs = update % trainer.log_every_n_steps == 0
        if logs or (pl_module.device.type == "cpu" and trainer.world_size == 1):
            self.refuse_nonfinite()
        if logs:
            self._log(trainer, pl_module, update)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the updates since the last line of the log, before anything is saved."""
        self.refuse_nonfinite()

    def refuse_nonfinite(self) -> None:
        """Raises UserError on every process if a loss or gradient of any was not finite; all must call it at once."""
        first_bad = torch.tensor(processes.gather(self.first_bad.tolist())).amin(0)
        if first_bad.isinf().all():
            return
        k = int(first_bad.argmin())
        where = f"logsnr in [{bin_name(k).replace('_', ', ')}]" if k < 8 else "in the gradient"
        raise UserError(
            f"{self.prefix}: the loss is not finite at update {int(first_bad[k])}, {where}. Checkpoints from before "
            f"are kept; lower the learning rate, or use another parameterization, weighting or precision"
        )

    def _log(self, trainer: Any, pl_module: Any, update: int) -> None:
        seconds = time.perf_counter() - self.since
        # (world, 2, 8) -> (2, 8): every process had other images, and the loss is that of all
        sums, counts = torch.tensor(processes.gather(torch.stack([self.loss_sum, self.count]).tolist())).sum(0)
        values = {
            "loss": sums.sum() / counts.sum(),
            "gradient_norm": pl_module.gradient_norm,
            "learning_rate": trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0],
            "images_per_second": self.updates * self.images_per_update / seconds,
        }
        values |= {f"loss_by_logsnr/{bin_name(k)}": sums[k] / counts[k] for k in range(8) if counts[k]}
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.prefix}/{k}": float(v) for k, v in values.items()}, step=update)
        self._reset(pl_module)


class PassCount:
    """Counts the images that the networks of a module's denoisers see: once each, thrice with gradients.

    Going back costs about twice what going forth does.
    """

    def __init__(self, module: Any) -> None:
        self.images, self.on = 0, True
        self.trained = module.denoiser.network
        networks = {part.network for part in module.modules() if isinstance(part, Denoiser)}
        self.hooks = [network.register_forward_pre_hook(self._count) for network in networks]

    def _count(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self.on:
            self.images += len(arguments[0]) * (3 if network is self.trained and torch.is_grad_enabled() else 1)

    def close(self) -> None:
        """Counts no more."""
        for hook in self.hooks:
            hook.remove()


class Cost(Callback):
    """What a stage takes, restarts included: seconds, network passes and, where NVIDIA's library tells, joules.

    A network pass is the evaluation of one batch of `batch_size` images, whatever parts it was taken in; an update's
    with gradients is three. What is drawn or measured between updates is not counted.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.spent: dict[str, float | None] = {"training_seconds": 0.0, "joules": 0.0, "network_passes": 0.0}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the clock and the meter."""
        self.device, self.before = pl_module.device, self.spent
        self.clock, self.meter = time.perf_counter(), joules(pl_module.device)
        self.passes = PassCount(pl_module)
        self.passes.on = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the passes of a training step."""
        self.passes.on = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts no others."""
        self.passes.on = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves no hooks on networks that somebody may go on with, and copy."""
        if hasattr(self, "passes"):
            self.passes.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds up."""
        self.spent = self.state_dict()
        self.passes.close()

    def state_dict(self) -> dict[str, float | None]:
        """What was spent until now, by all processes, which must call this at once."""
        meter = joules(self.device)
        mine = None if meter is None or self.meter is None else meter - self.meter
        measured, images = zip(*processes.gather((mine, self.passes.images)), strict=True)
        return {
            "training_seconds": (self.before["training_seconds"] or 0) + time.perf_counter() - self.clock,
            "joules": _sum(self.before["joules"], *measured),
            "network_passes": _sum(self.before["network_passes"], sum(images) / self.batch_size),
        }

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """What was spent before; checkpoints of 0.2.0 do not know their passes."""
        self.spent = {"network_passes": None} | state_dict


def _sum(*values: float | None) -> float | None:
    """None where a part is not known."""
    return None if None in values else sum(filter(None, values))


def joules(device: torch.device) -> float | None:
    """What a GPU has used since its driver was loaded; None for other devices, and where NVIDIA's library is absent."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # a library, a driver or a device that does not tell
        return None


class ResumableCheckpoint(PerUpdate, Checkpoint):
    """Keeps `path` up to date: every `every_n_updates`, and when Ctrl-C or SIGTERM asks the training to stop.

    The signal is acted upon between two updates; a second one ends the process at once. Of several processes one may
    get it alone, and they agree on what to do about every five seconds.
    """

    def __init__(self, path: Path, every_n_updates: int, monitor: TrainingLog) -> None:
        self.path = path
        self.every_n_updates = every_n_updates
        self.monitor = monitor
        self.signal: int | None = None
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals."""
        super().on_train_start(trainer, pl_module)
        self.asked_at, self.asks_at = (trainer.global_step, time.monotonic()), trainer.global_step + 1
        self.handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for s in self.handlers:
            signal.signal(s, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    def on_update(self, trainer: Any, pl_module: Any, update: int) -> None:
        due = update % self.every_n_updates == 0
        stop = self._asked_to_stop(trainer, update, meets=due or update == trainer.max_steps)
        if due or stop:
            self.monitor.refuse_nonfinite()
            trainer.save_checkpoint(self.path)
        if stop:
            raise Interrupted(f"stopped at update {update}; the same command continues from there")

    def _asked_to_stop(self, trainer: Trainer, update: int, meets: bool) -> bool:
        """Whether any process got a signal; asking costs an exchange, so that it is done at the main process's pace."""
        if trainer.world_size == 1:
            return self.signal is not None
        if update < self.asks_at and not meets:
            return False
        before, then = self.asked_at
        self.asked_at = update, time.monotonic()
        opinions = processes.gather((self.signal is not None, (self.asked_at[1] - then) / (update - before)))
        seconds_per_update = max(opinions[0][1], 1e-6)
        self.asks_at = update + max(1, int(SECONDS_TO_STOP / seconds_per_update))
        return any(signalled for signalled, _ in opinions)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the handlers of signals, and raises one that came since the last update."""
        self._give_back()
        if self.signal is not None:
            signal.raise_signal(self.signal)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        self.handlers = {}


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
        self.look(trainer, denoiser.eval(), update, file)
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
