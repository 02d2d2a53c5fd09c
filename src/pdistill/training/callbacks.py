"""Lightning callbacks: what is logged, and when training is kept or stopped."""

import signal
import sys
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from pdistill import display, processes
from pdistill.errors import Interrupted, UserError
from pdistill.training.nonfinite import Skips

LOGSNR_EDGES = (-15.0, -10.0, -5.0, 0.0, 5.0, 10.0, 15.0)  # eight bins over [-20, 20]
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SECONDS_TO_STOP = 5.0  # after which a signal to one of several processes is known to all


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

    Stops the training with a UserError at the first loss or gradient that is not finite, or, with `skips`, at so many
    updates in a row that were left out because of their gradient; what is left out does not count in the loss.
    Everything is summed up on the device and read once every `log_every_n_steps` updates, when the sums of all
    processes are joined; on a single CPU, where reading is free, losses are looked at in each update.
    """

    def __init__(self, prefix: str, images_per_update: int, skips: int | None = None) -> None:
        self.prefix = prefix
        self.images_per_update = images_per_update
        self.skips = None if skips is None else Skips(prefix, skips)

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
        losses, logsnr = outputs["losses"].float(), outputs["logsnr"]
        bins = torch.bucketize(logsnr.clamp(-20, 20).to(self.edges.dtype), self.edges)
        ones = torch.ones_like(losses)
        if self.skips is not None:
            losses, ones = (torch.where(losses.isfinite(), values, 0.0) for values in (losses, ones))
        self.loss_sum.index_add_(0, bins, losses)
        self.count.index_add_(0, bins, ones)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_update(self, trainer: Any, pl_module: Any, update: int) -> None:
        self.updates += 1
        gradient = pl_module.gradient_norm
        if self.skips is not None:
            self.skips.add(pl_module.bad, update)
        if self.skips is not None or pl_module.loss_scaler is not None:  # which looks for a scale that overflows seldom
            gradient = torch.zeros_like(gradient)
        bad = torch.cat([self.loss_sum, gradient[None]]).isfinite().logical_not()
        self.first_bad = torch.where(bad, self.first_bad.clamp(max=update), self.first_bad)
        logs = update % trainer.log_every_n_steps == 0
        if logs or (pl_module.device.type == "cpu" and trainer.world_size == 1):
            self.refuse_nonfinite()
        if logs:
            self._log(trainer, pl_module, update)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the updates since the last line of the log, before anything is saved; tells of those left out."""
        self.refuse_nonfinite()
        if self.skips is not None and (line := self.skips.told()) and processes.is_main():
            print(line, file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        """What was left out until now."""
        return {} if self.skips is None else {"left_out": self.skips.counts.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counts on."""
        if self.skips is not None and "left_out" in state_dict:
            self.skips.counts = torch.tensor(state_dict["left_out"])

    def refuse_nonfinite(self) -> None:
        """Raises UserError on every process if a loss or gradient of any was not finite; all must call it at once."""
        if self.skips is not None:  # alike on all processes: their gradient is one
            self.skips.refuse_a_long_row()
        first_bad = torch.tensor(processes.gather(self.first_bad.tolist())).amin(0)
        if first_bad.isinf().all():
            return
        k = int(first_bad.argmin())
        where = f"logsnr in [{bin_name(k).replace('_', ', ')}]" if k < 8 else "in the gradient"
        raise UserError(
            f"{self.prefix}: the loss is not finite at update {int(first_bad[k])}, {where}. Checkpoints from before "
            f"are kept; lower the learning rate, use another parameterization, weighting or precision, or leave such "
            f"updates out with skip_nonfinite=true"
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
        if self.skips is not None:
            values["skipped_updates"] = self.skips.total
        display.tell(loss=float(values["loss"]), images_per_second=values["images_per_second"])
        values |= {f"loss_by_logsnr/{bin_name(k)}": sums[k] / counts[k] for k in range(8) if counts[k]}
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.prefix}/{k}": float(v) for k, v in values.items()}, step=update)
        self._reset(pl_module)


class ResumableCheckpoint(PerUpdate, Checkpoint):
    """Keeps `path` up to date: every `every_n_updates`, and when a signal asks the training to stop.

    The signal is acted upon between two updates; Ctrl-C after that ends the process at once. Of several processes one
    may get it alone, and they agree on what to do about every five seconds.
    """

    def __init__(self, path: Path, every_n_updates: int, monitor: TrainingLog) -> None:
        self.path = path
        self.every_n_updates = every_n_updates
        self.monitor = monitor
        self.signal: int | None = None
        self.handlers = {s: signal.getsignal(s) for s in STOPPING}  # before Lightning puts its own there
        if not callable(self.handlers[signal.SIGUSR2]):  # submitit's word, and nobody else's
            del self.handlers[signal.SIGUSR2]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals."""
        super().on_train_start(trainer, pl_module)
        self.asked_at, self.asks_at = (trainer.global_step, time.monotonic()), trainer.global_step + 1
        for s in self.handlers:
            signal.signal(s, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = self.signal or number

    def on_update(self, trainer: Any, pl_module: Any, update: int) -> None:
        due = update % self.every_n_updates == 0
        stop = self._asked_to_stop(trainer, update, meets=due or update == trainer.max_steps)
        if due or stop:
            self.monitor.refuse_nonfinite()
            trainer.save_checkpoint(self.path)
        if stop:
            raise Interrupted(f"stopped at update {update}; the same command continues from there", stop)

    def _asked_to_stop(self, trainer: Trainer, update: int, meets: bool) -> int | None:
        """The signal that any process got; asking costs an exchange, so that it is done at the main process's pace."""
        if trainer.world_size == 1:
            return self.signal
        if update < self.asks_at and not meets:
            return None
        before, then = self.asked_at
        self.asked_at = update, time.monotonic()
        opinions = processes.gather((self.signal, (self.asked_at[1] - then) / (update - before)))
        seconds_per_update = max(opinions[0][1], 1e-6)
        self.asks_at = update + max(1, int(SECONDS_TO_STOP / seconds_per_update))
        return next((number for number, _ in opinions if number is not None), None)

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
