"""Lightning callbacks: what is logged, when training is kept or stopped, and FID while it runs."""

import signal
import sys
import time
from abc import abstractmethod
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from tqdm import tqdm

from pdistill.dataset import ImageSet
from pdistill.denoiser import Denoiser
from pdistill.errors import Interrupted, UserError
from pdistill.metrics.reference import fid_metric, fid_name, generate, measure_fid

LOGSNR_EDGES = (-15.0, -10.0, -5.0, 0.0, 5.0, 10.0, 15.0)  # eight bins over [-20, 20]


def bin_name(k: int) -> str:
    """The k-th logsnr bin in words: "-20_-15", ..., "15_20"."""
    return f"{-20 + 5 * k}_{-15 + 5 * k}"


class PerUpdate(Callback):
    """Calls `on_update` after each update of the weights: with accumulated gradients, not after every batch."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.last_update = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step != self.last_update:
            self.last_update = trainer.global_step
            self.on_update(trainer, module, trainer.global_step)

    @abstractmethod
    def on_update(self, trainer: Trainer, module: LightningModule, update: int) -> None: ...


class TrainingLog(PerUpdate):
    """Logs loss, its mean in eight bins of logsnr, gradient norm, learning rate and images/s under `prefix`/.

    Stops the training with a UserError at the first loss or gradient that is not finite. Everything is summed
    up on the device and read once every `log_every_n_steps` updates, on a CPU (where reading is free) at each.
    """

    def __init__(self, prefix: str, images_per_update: int) -> None:
        self.prefix = prefix
        self.images_per_update = images_per_update

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.edges = torch.tensor(LOGSNR_EDGES, device=module.device)
        self.first_bad = torch.full((9,), torch.inf, device=module.device)  # update per bin, and for the gradient
        self._reset(module)

    def _reset(self, module: LightningModule) -> None:
        self.loss_sum, self.count = (torch.zeros(8, device=module.device) for _ in range(2))
        self.updates, self.since = 0, time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs: dict, batch: dict, batch_idx: int) -> None:
        losses, logsnr = outputs["losses"], outputs["logsnr"]
        bins = torch.bucketize(logsnr.clamp(-20, 20), self.edges)
        self.loss_sum.index_add_(0, bins, losses.float())
        self.count.index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_update(self, trainer: Trainer, module: LightningModule, update: int) -> None:
        self.updates += 1
        bad = torch.cat([self.loss_sum, module.gradient_norm[None]]).isfinite().logical_not()
        self.first_bad = torch.where(bad, self.first_bad.clamp(max=update), self.first_bad)
        logs = update % trainer.log_every_n_steps == 0
        if logs or module.device.type == "cpu":
            self.refuse_nonfinite()
        if logs:
            self._log(trainer, module, update)

    def refuse_nonfinite(self) -> None:
        if self.first_bad.isinf().all():
            return
        k = int(self.first_bad.argmin())
        where = f"logsnr in [{bin_name(k).replace('_', ', ')}]" if k < 8 else "in the gradient"
        raise UserError(
            f"{self.prefix}: the loss is not finite at update {int(self.first_bad[k])}, {where}. The last good "
            f"checkpoint is kept; lower the learning rate, or use another parameterization, weighting or precision"
        )

    def _log(self, trainer: Trainer, module: LightningModule, update: int) -> None:
        seconds = time.perf_counter() - self.since
        values = {
            "loss": self.loss_sum.sum() / self.count.sum(),
            "gradient_norm": module.gradient_norm,
            "learning_rate": trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0],
            "images_per_second": self.updates * self.images_per_update / seconds,
        }
        per_bin, counts = (self.loss_sum / self.count).tolist(), self.count.tolist()
        values |= {f"loss_by_logsnr/{bin_name(k)}": per_bin[k] for k in range(8) if counts[k]}
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.prefix}/{k}": float(v) for k, v in values.items()}, step=update)
        self._reset(module)


class Cost(Callback):
    """Wall-clock seconds of a stage and, where NVIDIA's library tells, its GPUs' joules, restarts included."""

    def __init__(self) -> None:
        self.spent: dict[str, float | None] = {"training_seconds": 0.0, "joules": 0.0}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.device, self.before = module.device, self.spent
        self.clock, self.meter = time.perf_counter(), joules(module.device)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.spent = self.state_dict()
        if self.spent["joules"] is not None:
            used = torch.tensor(self.spent["joules"], dtype=torch.float64, device=module.device)
            self.spent["joules"] = float(trainer.strategy.reduce(used, reduce_op="sum"))

    def state_dict(self) -> dict[str, float | None]:
        meter = joules(self.device)
        known = None not in (meter, self.meter, self.before["joules"])
        return {
            "training_seconds": self.before["training_seconds"] + time.perf_counter() - self.clock,
            "joules": self.before["joules"] + meter - self.meter if known else None,
        }

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.spent = state


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

    The signal is acted upon between two updates; a second one ends the process at once.
    """

    def __init__(self, path: Path, every_n_updates: int, monitor: TrainingLog) -> None:
        self.path = path
        self.every_n_updates = every_n_updates
        self.monitor = monitor
        self.signal: int | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for s in self.handlers:
            signal.signal(s, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    def on_update(self, trainer: Trainer, module: LightningModule, update: int) -> None:
        due = update % self.every_n_updates == 0
        stop = self.signal is not None
        if trainer.world_size > 1:  # all ranks must agree, which costs an exchange: only now and then
            stop = (due or update % trainer.log_every_n_steps == 0) and trainer.strategy.reduce_boolean_decision(
                stop, all=False
            )
        if due or stop:
            self.monitor.refuse_nonfinite()
            trainer.save_checkpoint(self.path)
        if stop:
            raise Interrupted(f"stopped at update {update}; the same command continues from there")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "handlers"):
            self.on_train_end(trainer, module)


class FID(PerUpdate):
    """The Frechet distance of samples to a whole dataset, with any extractor.

    `measure` is a function of the denoiser; in training, the module's `result` is measured every
    `every_n_updates` (None: never) at `num_steps` and logged as `prefix`/`name`.
    """

    def __init__(
        self,
        extractor: torch.nn.Module,
        data: ImageSet,
        num_samples: int,
        seed: int = 0,
        batch_size: int = 250,
        every_n_updates: int | None = None,
    ) -> None:
        self.name = fid_name(extractor)
        self.extractor = extractor
        self.data = data
        self.num_samples = num_samples
        self.seed = seed
        self.batch_size = batch_size
        self.every_n_updates = every_n_updates
        self.prefix, self.num_steps = "", 1  # of the stage at hand

    def measure(
        self, denoiser: Denoiser, num_steps: int, device: torch.device | str = "cpu", sampler: str = "ddim"
    ) -> float:
        """The figure over all ranks; sample i is made from (seed, i) by rank i modulo the number of ranks."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        world = torch.distributed.get_world_size() if distributed else 1
        metric = fid_metric(self.extractor, self.data, rank, device)
        batches = generate(
            denoiser,
            range(rank, self.num_samples, world),
            num_steps,
            self.seed,
            self.batch_size,
            device,
            sampler=sampler,
        )
        total = -(-self.num_samples // (world * self.batch_size))
        bar = tqdm(batches, f"{self.name} at {num_steps} steps", total, unit="batch", leave=False, disable=rank > 0)
        return measure_fid(metric, bar)

    def on_update(self, trainer: Trainer, module: LightningModule, update: int) -> None:
        if self.every_n_updates and update % self.every_n_updates == 0 and update < trainer.max_steps:
            value = self.measure(module.result.eval(), self.num_steps, module.device)
            module.train()
            for logger in trainer.loggers:
                logger.log_metrics({f"{self.prefix}/{self.name}": value}, step=update)


class ProgressBar(TQDMProgressBar):
    """One bar per stage that counts its updates, resumed ones included."""

    def __init__(self, description: str) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 20)  # a log keeps every refresh
        self.description = description

    @property
    def total_train_batches(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def on_train_epoch_start(self, trainer: Trainer, *_) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.initial = trainer.global_step * trainer.accumulate_grad_batches
        self.train_progress_bar.set_description(self.description)

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict:
        return {}
