"""What the framework costs, as ratios measured in one process: `python benchmarks/speed.py`, or `make bench`.

The two sides of a ratio take turns, and it is that of the medians over all their repetitions. Rows appear as they are
measured; with `--quick` (the digits network alone, fewer rounds) all are there in one or two minutes. Measure on an
otherwise quiet machine. `--json FILE` keeps every repetition in seconds. `--settings` measures instead what compiling,
bfloat16 and the other settings of a run bring, and what they change in the target.
"""

import argparse
import contextlib
import copy
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pdistill.bars import bar
from pdistill.commands.contenders import Contender
from pdistill.commands.evaluate import Evaluation
from pdistill.commands.settings import Evaluate, conf
from pdistill.dataset import ImageSet, digits
from pdistill.dataset.batches import to_float, to_uint8
from pdistill.denoiser import Denoiser
from pdistill.errors import Interrupted
from pdistill.files import write_json
from pdistill.generation import Draw, generate
from pdistill.metrics.classifier import train_classifier
from pdistill.metrics.distances import FrechetDistance, moments
from pdistill.metrics.settings import Metrics
from pdistill.parameterization import X
from pdistill.sampling import sample
from pdistill.schedule import CosineSchedule
from pdistill.steps import Stage
from pdistill.target import distillation_target
from pdistill.training import execution
from pdistill.training.data import ImageDataModule
from pdistill.training.distillation import DistillationModule
from pdistill.training.fit import FitSettings, fit
from pdistill.training.module import DenoisingModule, Recipe
from pdistill.training.settings import Distillation, Execution, Training
from pdistill.training.teacher import TeacherModule
from pdistill.weighting import truncated_snr

WARM_UP = 3  # steps of every round that are not counted
EMA = 0.999
LOADED = 128  # images of a batch of the loader
ON_CPU = partial(Trainer, accelerator="cpu", devices=1, log_every_n_steps=50)
FID_SAMPLES, FID_FEATURES = 10_000, 2048  # Inception's features


@dataclass(frozen=True)
class Case:
    """A network, and how often what is measured with it."""

    network: str
    size: int
    channels: int
    batch: int
    steps: int
    """Of a training, in every round."""
    rounds: int
    evaluations: int
    """Of the network in a sampling."""
    samplings: int
    """In every round."""
    limit: float
    """Of the training step over the bare loop's."""
    overrides: tuple[str, ...] = ()
    """Of the network, as they are typed."""


DIGITS = Case("digits", 8, 1, batch=64, steps=60, rounds=6, evaluations=16, samplings=20, limit=1.10)
CIFAR10 = Case("cifar10", 32, 3, batch=4, steps=4, rounds=3, evaluations=4, samplings=3, limit=1.03)
QUICK = Case("digits", 8, 1, batch=64, steps=30, rounds=2, evaluations=16, samplings=4, limit=1.10)


@dataclass
class Results:
    """Prints every row when it is measured, and keeps the seconds in a file, if one is given."""

    file: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def begin(self) -> None:
        print(f"{machine()['processor']}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32\n")
        print(f"{'network':<9}{'ratio':<48}{'measured':>9}{'limit':>11}{'ours, ms':>11}{'theirs, ms':>12}", flush=True)

    def ratio(self, network: str, what: str, limit: object, ours: list[float], theirs: list[float]) -> None:
        a, b = statistics.median(ours), statistics.median(theirs)
        row = f"{network:<9}{what:<48}{a / b:>9.3f}{limit!s:>11}{1000 * a:>11.1f}{1000 * b:>12.1f}"
        self._add(row, network=network, ratio=what, limit=str(limit), ours=ours, theirs=theirs)

    def seconds(self, what: str, values: list[float]) -> None:
        row = f"{'':<9}{what:<48}{'':>9}{'':>11}{1000 * statistics.median(values):>11.1f}"
        self._add(row, seconds=what, ours=values)

    def _add(self, row: str, **kept: Any) -> None:
        print(row, flush=True)
        self.rows.append(kept)
        if self.file is not None:
            write_json(self.file, {"machine": machine(), "rows": self.rows})


def machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    return {"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}


class Clock(Callback):
    """Seconds from the end of one training step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.tick()

    def tick(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of the steps."""
        return between(self.ends)


def between(ends: list[float]) -> list[float]:
    """Seconds of the steps, without those that warm up."""
    return [b - a for a, b in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def in_turns(
    ours: Callable[[], list[float]], theirs: Callable[[], list[float]], rounds: int, title: str
) -> tuple[list[float], list[float]]:
    """What both measure, taking turns."""
    a, b = [], []
    for _ in bar(range(rounds), title, unit="round"):
        a += ours()
        b += theirs()
    return a, b


def new_denoiser(case: Case) -> Denoiser:
    with initialize_config_dir(str(conf()), version_base="1.3"):
        part = instantiate(compose("train", [f"network={case.network}", "name=bench", *case.overrides]).network)
    torch.manual_seed(0)
    denoiser = Denoiser(part(case.size, case.channels, case.channels), X(), CosineSchedule())
    torch.nn.init.normal_(denoiser.network.conv_out.weight)  # else all samples are alike
    return denoiser


def fitted(
    module: DenoisingModule, data: ImageSet, case: Case, clock: Clock | None = None, trainer: Any = ON_CPU
) -> list[float]:
    """Steps as a stage of a run makes them: Lightning's loop, all callbacks, a logger."""
    clock = clock or Clock()
    with tempfile.TemporaryDirectory() as directory:
        settings = FitSettings(
            directory=Path(directory) / "stage",
            prefix="bench",
            updates=case.steps + WARM_UP + 1,
            num_steps=8,
            trainer=trainer,
            loggers=[CSVLogger(directory)],
            callbacks=[clock],
            checkpoint_every_n_updates=10**9,
            progress_bar=False,
        )
        fit(module, ImageDataModule(data, case.batch, seed=0, stage=module.stage_index), settings)
    return clock.seconds()


def bare(
    model: Denoiser, data: ImageSet, case: Case, clock: Clock | None = None, autocast: Any = contextlib.nullcontext
) -> list[float]:
    """The teacher's step as a plain loop: batch, loss, clipping, AdamW, EMA; nothing logged. On the model's device."""
    clock = clock or Clock()
    device = next(model.parameters()).device
    images = data.images.to(device)
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0, fused=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA)).requires_grad_(False)
    for _ in range(case.steps + WARM_UP + 1):
        x = to_float(images[torch.randint(len(images), (case.batch,), device=device)])
        t = torch.rand(case.batch, device=device)
        logsnr = model.schedule(t)
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in model.schedule.alpha_sigma(logsnr))
        with autocast():
            x_hat = model(alpha * x + sigma * torch.randn_like(x), t)
        loss = (truncated_snr(logsnr) * (x_hat - x).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        clock.tick()
    return clock.seconds()


def loaded(case: Case, batches: int = 50) -> list[float]:
    """Seconds for an image that the loader gives, from a dataset of CIFAR-10's size, flipped and as floats."""
    images = torch.randint(0, 256, (50_000, case.channels, case.size, case.size), dtype=torch.uint8)
    stream = iter(ImageSet("noise", images, flips=True).batches(LOADED, 0, 0))
    return [seconds / LOADED for seconds in timed(lambda: to_float(next(stream)["image"]), batches)]


def training(case: Case, results: Results) -> None:
    """A step of training against a bare loop, of distillation against training, and the loader against both."""
    torch.manual_seed(0)
    shape = (512, case.channels, case.size, case.size)
    data, model = ImageSet("noise", torch.randint(0, 256, shape, dtype=torch.uint8)), new_denoiser(case)

    def teacher(ema: float | None) -> list[float]:
        settings = Training(batch_size=case.batch, ema_decay=ema, warmup_updates=0)
        return fitted(TeacherModule(model, Recipe(settings, truncated_snr)), data, case)

    def distillation() -> list[float]:
        stage = Stage(index=1, num_steps=8, teacher=0, teacher_steps=2, updates=case.steps + WARM_UP + 1)
        recipe = Recipe(Distillation(batch_size=case.batch), truncated_snr)
        return fitted(DistillationModule(copy.deepcopy(model), stage, recipe), data, case)

    what = "Lightning teacher step / bare loop"
    framework, loop = in_turns(lambda: teacher(EMA), lambda: bare(model, data, case), case.rounds, what)
    results.ratio(case.network, what, case.limit, framework, loop)
    images = [seconds / case.batch for seconds in framework]
    results.ratio(case.network, "images/s of the loader / of training", "5 or more", images, loaded(case))
    what = "distillation step / teacher step"
    results.ratio(case.network, what, 1.55, *in_turns(distillation, lambda: teacher(None), case.rounds, what))


@dataclass(frozen=True)
class Setting:
    """A way to run the same networks."""

    name: str
    execution: Execution = field(default_factory=Execution)
    precision: str = "32-true"

    @property
    def mixed(self) -> bool:
        return "mixed" in self.precision

    @property
    def trainer(self) -> Any:
        return partial(ON_CPU, precision=self.precision)


PLAIN = Setting("as by default")
SETTINGS = (
    Setting("channels_last", Execution(channels_last=True)),
    Setting("gradient_checkpointing", Execution(gradient_checkpointing=True)),
    Setting("bf16-mixed", precision="bf16-mixed"),
    Setting("compile", Execution(compile=True)),
    Setting("compile, channels_last", Execution(compile=True, channels_last=True)),
    Setting("compile, bf16-mixed", Execution(compile=True), "bf16-mixed"),
)


def with_settings(case: Case, results: Results, chosen: list[str]) -> None:
    """Both steps with each setting over the teacher's without it, their ratio, and what becomes of the target."""
    torch.manual_seed(0)
    shape = (512, case.channels, case.size, case.size)
    data, model = ImageSet("noise", torch.randint(0, 256, shape, dtype=torch.uint8)), new_denoiser(case)
    stage = Stage(index=1, num_steps=8, teacher=0, teacher_steps=2, updates=case.steps + WARM_UP + 1)

    def teacher(setting: Setting) -> list[float]:
        settings = Training(batch_size=case.batch, ema_decay=None, warmup_updates=0)
        recipe = Recipe(settings, truncated_snr, execution=setting.execution)
        return fitted(TeacherModule(copy.deepcopy(model), recipe), data, case, trainer=setting.trainer)

    def student(setting: Setting) -> DistillationModule:
        recipe = Recipe(Distillation(batch_size=case.batch), truncated_snr, execution=setting.execution)
        return DistillationModule(copy.deepcopy(model), stage, recipe)

    @torch.inference_mode()
    def target(setting: Setting) -> Tensor:
        module, random = student(setting), torch.Generator().manual_seed(1)
        z = torch.randn(case.batch, case.channels, case.size, case.size, generator=random)
        t = torch.randint(1, stage.num_steps + 1, (case.batch,), generator=random) / stage.num_steps
        halves = torch.autocast("cpu", torch.bfloat16, enabled=setting.mixed)
        with execution.running(module, setting.mixed), halves:
            return distillation_target(module.teacher, z, t, stage.num_steps)

    exact = target(PLAIN)
    for setting in (s for s in (PLAIN, *SETTINGS) if not chosen or s.name in chosen):
        what, plain = f"{setting.name}: teacher step / plain", []
        if setting is not PLAIN:
            ours, plain = in_turns(partial(teacher, setting), partial(teacher, PLAIN), case.rounds, what)
            results.ratio(case.network, what, "", ours, plain)
        what = f"{setting.name}: distillation / teacher"
        distillation = partial(lambda s: fitted(student(s), data, case, trainer=s.trainer), setting)
        ours, theirs = in_turns(distillation, partial(teacher, setting), case.rounds, what)
        results.ratio(case.network, what, 1.55, ours, theirs)
        if plain:
            results.ratio(case.network, f"{setting.name}: distillation / plain teacher", 1.55, ours, plain)
            change = float((target(setting) - exact).norm() / exact.norm())
            print(f"{case.network:<9}{setting.name + ': relative change of the target':<48}{change:.1e}", flush=True)


def sampling(case: Case, results: Results) -> None:
    """`sample` against the network evaluations alone."""
    model = new_denoiser(case).eval()
    noise = torch.randn(case.batch, case.channels, case.size, case.size)
    t = torch.full((case.batch,), 500.0)

    @torch.inference_mode()
    def evaluations() -> None:
        for _ in range(case.evaluations):
            model.network(noise, t)

    what = f"sample() / its {case.evaluations} network evaluations"
    ours, theirs = in_turns(
        lambda: timed(lambda: sample(model, noise, case.evaluations), case.samplings),
        lambda: timed(evaluations, case.samplings),
        case.rounds,
        what,
    )
    results.ratio(case.network, what, 1.03, ours, theirs)


def evaluation(case: Case, results: Results, num_samples: int, rounds: int) -> None:
    """A row of evaluate against its samples and their features alone, of digits."""
    metrics = Metrics(extractor=train_classifier, num_samples=num_samples)
    measured = Evaluation(Evaluate(metrics=metrics), digits(), torch.device("cpu"))
    model, contender = new_denoiser(case).eval(), Contender("bench", "none", "ddim", case.evaluations)

    @torch.inference_mode()
    def alone() -> None:
        for images in generate(model, range(num_samples), Draw(case.evaluations)):
            measured.extractor(to_uint8(images))

    def row() -> None:
        measured.metrics(model, contender)

    alone()
    what = "evaluate's row / samples and features"
    results.ratio("digits", what, 1.05, *in_turns(lambda: timed(row, 1), lambda: timed(alone, 1), rounds, what))


def frechet(results: Results, repeats: int) -> None:
    """The root of the reference's covariance, taken once, and each FID after it."""
    random = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(FID_SAMPLES, FID_FEATURES, generator=random) for _ in range(2))
    mean, covariance = moments(real)
    of = f"{FID_SAMPLES:,} at {FID_FEATURES} features"
    results.seconds("FID's root of the reference, once", timed(lambda: FrechetDistance(mean, covariance), repeats))
    distance = FrechetDistance(mean, covariance)
    results.seconds(f"FID of {of}", timed(lambda: distance.of(fake), repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the digits network alone, in one or two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keeps every repetition, in seconds")
    parser.add_argument("--settings", nargs="*", metavar="NAME", help="what settings bring: all, or those named")
    parser.add_argument("--network", choices=["digits", "cifar10"], help="with --settings: this one alone")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = Results(options.json)
    results.begin()
    if options.settings is not None:
        for case in (QUICK, CIFAR10):
            if options.network in (None, case.network):
                with_settings(case, results, options.settings)
        return
    for case in (QUICK,) if options.quick else (DIGITS, CIFAR10):
        training(case, results)
        sampling(case, results)
    evaluation(QUICK, results, *((1000, 1) if options.quick else (3000, 3)))
    frechet(results, 1 if options.quick else 3)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, Interrupted):
        sys.exit("stopped: what was measured stands above")
