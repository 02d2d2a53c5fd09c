"""What the framework costs, as ratios measured in one process: `make bench`.

Each pair of contenders takes turns, and the ratio is that of the medians over all their steps.
"""

import copy
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, Fabric, Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pdistill.commands.evaluate import Contender, Evaluation
from pdistill.dataset import ImageSet
from pdistill.dataset.batches import ImageDataModule, to_float, to_uint8
from pdistill.denoiser import Denoiser
from pdistill.metrics.distances import FrechetDistance
from pdistill.metrics.reference import generate
from pdistill.parameterization import X
from pdistill.sampling import sample
from pdistill.schedule import CosineSchedule, alpha_sigma
from pdistill.training.callbacks import ResumableCheckpoint, TrainingLog
from pdistill.training.distillation import DistillationModule
from pdistill.training.module import DenoisingModule
from pdistill.training.teacher import TeacherModule
from pdistill.weighting import truncated_snr

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
WARM_UP = 3  # steps of every round that are not counted
CONF = Path(__file__).parent.parent / "conf"


class Clock(Callback):
    """Seconds from the end of one training step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_) -> None:
        self.ends.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.ends[WARM_UP:], self.ends[WARM_UP + 1 :], strict=False)]


def denoiser(network: str, size: int, channels: int) -> Denoiser:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        network = instantiate(compose("train", [f"network={network}", "name=bench"]).network)
    return Denoiser(network(size, channels, channels), X(), CosineSchedule()).train()


def fit(module: DenoisingModule, data: ImageSet, batch_size: int, steps: int) -> list[float]:
    """Steps of Lightning's loop with the callbacks and the logger that training has."""
    with tempfile.TemporaryDirectory() as directory:
        log, clock = TrainingLog("bench", batch_size), Clock()
        checkpoint = ResumableCheckpoint(Path(directory) / "last.ckpt", 10**9, log)
        trainer = Trainer(
            accelerator="cpu",
            logger=CSVLogger(directory),
            callbacks=[log, checkpoint, clock],
            max_epochs=-1,
            max_steps=steps + WARM_UP + 1,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=50,
        )
        trainer.fit(module, ImageDataModule(data, batch_size, 0, 0))
    return clock.steps()


def bare_teacher(model: Denoiser, data: ImageSet, batch_size: int, steps: int) -> list[float]:
    """The same teacher step as a plain loop: batch, loss, clipping, AdamW, EMA; nothing logged."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0, fused=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999)).requires_grad_(False)
    ends = []
    for _ in range(steps + WARM_UP + 1):
        x = to_float(data.images[torch.randint(len(data.images), (batch_size,))])
        t = torch.rand(batch_size)
        logsnr = model.schedule(t)
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in alpha_sigma(logsnr))
        x_hat = model(alpha * x + sigma * torch.randn_like(x), t)
        loss = (truncated_snr(logsnr) * (x_hat - x).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        ends.append(time.perf_counter())
    return [b - a for a, b in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]


def loaded(size: int, channels: int, batch_size: int, steps: int) -> list[float]:
    """Seconds for each batch that the loader gives, from a dataset of CIFAR-10's size, flipped and as floats."""
    images = torch.randint(0, 256, (50_000, channels, size, size), dtype=torch.uint8)
    batches = iter(ImageSet("noise", images, flips=True).batches(batch_size, 0, 0))
    return timed(lambda: to_float(next(batches)["image"]), steps)


def evaluation() -> tuple[float, float]:
    """Seconds for a row of evaluate.py, and for its samples and their features alone: 3,000 digits at 16 steps."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", ["denoiser=none", "metrics.num_samples=3000"])
    fabric = Fabric(accelerator="cpu", devices=1)
    measured, model = Evaluation(cfg, instantiate(cfg.dataset), fabric), denoiser("digits", 8, 1).eval()
    torch.nn.init.normal_(model.network.conv_out.weight)  # else all samples are alike

    def alone() -> None:
        with torch.inference_mode():
            for images in generate(model, range(3000), 16, 0, 250):
                measured.extractor(to_uint8(images))

    def row() -> None:
        measured.figures(model, Contender("bench", "none", "ddim", 16))

    row(), alone()
    return compare(lambda: timed(row, 1), lambda: timed(alone, 1), 3)


def frechet(dimensions: int = 2048, samples: int = 10_000) -> tuple[float, float]:
    """Seconds for the root of the reference's covariance, taken once, and for each FID after it."""
    random = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(samples, dimensions, generator=random, dtype=torch.float64) for _ in range(2))
    start = time.perf_counter()
    distance = FrechetDistance(real.mean(0), torch.cov(real.T))
    root = time.perf_counter() - start
    (each,) = timed(lambda: distance(fake), 1)
    return root, each


def compare(ours: Callable[[], list[float]], theirs: Callable[[], list[float]], rounds: int) -> tuple[float, float]:
    """The medians of both, taking turns."""
    a, b = [], []
    for _ in range(rounds):
        a += ours()
        b += theirs()
    return statistics.median(a), statistics.median(b)


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    table = Table(title=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    for heading in ("network", "ratio", "measured", "limit", "ours, ms", "theirs, ms"):
        table.add_column(heading)

    def row(network: str, what: str, limit: float | str, ours: float, theirs: float) -> None:
        table.add_row(network, what, f"{ours / theirs:.3f}", f"{limit}", f"{ours * 1000:.1f}", f"{theirs * 1000:.1f}")

    settings = {"learning_rate": 1e-3}
    for network, size, channels, batch, steps, rounds, limit in (
        ("digits", 8, 1, 64, 60, 6, 1.10),
        ("cifar10", 32, 3, 4, 4, 3, 1.03),
    ):
        torch.manual_seed(0)
        data = ImageSet("noise", torch.randint(0, 256, (512, channels, size, size), dtype=torch.uint8))
        model = denoiser(network, size, channels)

        def teacher(model=model, data=data, batch=batch, steps=steps) -> list[float]:
            return fit(TeacherModule(model, truncated_snr, ema_decay=0.999, **settings), data, batch, steps)

        def bare(model=model, data=data, batch=batch, steps=steps) -> list[float]:
            return bare_teacher(model, data, batch, steps)

        def teacher_without_ema(model=model, data=data, batch=batch, steps=steps) -> list[float]:
            return fit(TeacherModule(model, truncated_snr, **settings), data, batch, steps)

        def distillation(model=model, data=data, batch=batch, steps=steps) -> list[float]:
            module = DistillationModule(copy.deepcopy(model), 8, truncated_snr, updates=steps, **settings)
            return fit(module, data, batch, steps)

        framework, bare_loop = compare(teacher, bare, rounds)
        row(network, "Lightning teacher step / bare loop", limit, framework, bare_loop)
        in_training, in_loader = framework / batch, statistics.median(loaded(size, channels, 128, 50)) / 128
        row(network, "images/s of the loader / of training", "5 or more", in_training, in_loader)
        row(network, "distillation step / teacher step", 1.75, *compare(distillation, teacher_without_ema, rounds))
        model = model.eval()
        noise, t, n = torch.randn(batch, channels, size, size), torch.full((batch,), 500.0), 16 if size == 8 else 4

        def sampled(model=model, noise=noise, n=n) -> list[float]:
            return timed(lambda: sample(model, noise, n), 20 if n == 16 else 3)

        @torch.no_grad()
        def evaluated(model=model, noise=noise, n=n, t=t) -> list[float]:
            return timed(lambda: [model.network(noise, t) for _ in range(n)], 20 if n == 16 else 3)

        row(network, f"sample() / its {n} network evaluations", 1.03, *compare(sampled, evaluated, 4))
    row("digits", "evaluate.py / its samples and features", 1.05, *evaluation())
    Console(width=120).print(table)
    root, each = frechet()
    print(f"FID of 10,000 samples at 2048 dimensions: the reference's root {root:.1f} s, then {each:.1f} s")


if __name__ == "__main__":
    main()
