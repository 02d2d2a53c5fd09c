"""What benchmarks/gpu.py measures in its own process: steps of training, sampling, and losses of equal seeds.

The loops are those of benchmarks/speed.py. Steps are timed by the device's own events, and their median counts.
"""

import gc
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import speed
import torch
from diffusers import DiffusionPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pdistill.commands.settings import Distill, conf, settings_of
from pdistill.dataset import ImageSet
from pdistill.denoiser import Denoiser
from pdistill.network import set_dropout
from pdistill.sampling import sample
from pdistill.steps import Stage
from pdistill.training.distillation import DistillationModule
from pdistill.training.module import DenoisingModule, Recipe
from pdistill.training.teacher import TeacherModule

GIB = 2**30
SIZE, CHANNELS = 32, 3
TEACHER_PASSES, DISTILLATION_PASSES = 3, 5  # forward passes' worth of an update; going back counts for two
SAMPLED_STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Sizes:
    """How large everything is: `REAL`, or the toy of a rehearsal."""

    trainer: str
    """Of conf/trainer: it says the device."""
    ddp: str
    network: str
    batches: dict[int, int]
    """Batch size -> updates that are timed."""
    sampled: int
    """Images of a batch of the samplers."""
    samplings: int
    matmul: int
    """Rows of the square matrices."""
    parity_batch: int
    parity_updates: int
    backend: str
    """Of torch.compile."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.trainer == "gpu" else "cpu")


REAL = Sizes("gpu", "ddp", "cifar10", {128: 30, 512: 8}, 512, 10, 8192, 128, 200, "inductor")
TOY = Sizes("cpu", "ddp_cpu", "digits", {4: 2, 8: 2}, 4, 2, 128, 4, 5, "aot_eager")


@dataclass(frozen=True)
class Variant:
    """A way to compute the same."""

    tf32: bool = True
    bf16: bool = True
    channels_last: bool = False
    compiled: bool = False
    graphs: bool = False
    trainer: str | None = None
    """Another one of conf/trainer."""

    @property
    def precision(self) -> str:
        return "bf16-mixed" if self.bf16 else "32-true"

    def autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()


SPEED = {
    "float32": Variant(tf32=False, bf16=False),
    "tf32": Variant(bf16=False),
    "bf16": Variant(),
    "bf16-channels_last": Variant(channels_last=True),
    "bf16-channels_last-compile": Variant(channels_last=True, compiled=True),
    "bf16-channels_last-compile-graphs": Variant(channels_last=True, compiled=True, graphs=True),
}


def parity(sizes: Sizes) -> dict[str, Variant]:
    """Ways whose losses are held against those of float32; float32 again says how exact that can be."""
    exact = Variant(tf32=False, bf16=False)
    return {
        "float32": exact,
        "float32-again": exact,
        "bf16": Variant(),
        "compile": Variant(tf32=False, bf16=False, compiled=True),
        "ddp": Variant(tf32=False, bf16=False, trainer=sizes.ddp),
    }


def prepare(network: nn.Module, how: Variant, sizes: Sizes) -> None:
    """Lays out and compiles a network in place.

    Its `forward` is compiled, not the module: hooks, which count passes, stay outside. What CUDA graphs give is copied,
    for the next run of a graph overwrites it.
    """
    if how.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not how.compiled:
        return
    mode = "reduce-overhead" if how.graphs and sizes.backend == "inductor" else None
    compiled = torch.compile(network.forward, backend=sizes.backend, mode=mode)

    def forward(*inputs: Any, **options: Any) -> Any:
        if not how.graphs:
            return compiled(*inputs, **options)
        torch.compiler.cudagraph_mark_step_begin()
        output: Any = compiled(*inputs, **options)
        output.sample = output.sample.clone()
        return output

    network.forward = forward


def fresh(tf32: bool) -> None:
    """Nothing is left of what was measured before, and float32 is computed as it is asked for."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


class DeviceClock(speed.Clock):
    """Seconds by the events of a GPU, which knows when a step has ended; on a CPU by the clock. Keeps the losses."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.events, self.losses = device, [], []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        self.tick()

    def tick(self) -> None:
        if self.device.type != "cuda":
            return super().tick()
        self.events.append(torch.cuda.Event(enable_timing=True))
        self.events[-1].record()

    def seconds(self) -> list[float]:
        if self.events:
            torch.cuda.synchronize()
            self.ends = [self.events[0].elapsed_time(event) / 1000 for event in self.events]
        return super().seconds()


@dataclass
class Bench:
    """A network of the given sizes, and what is measured of it."""

    sizes: Sizes
    data: Callable[[], ImageSet]

    def model(self) -> Denoiser:
        """A fresh one, the same each time."""
        return speed.new_denoiser(self.case(1, 1))

    def settings(self, how: Variant, *words: str) -> Distill:
        """Those of the paper's recipe."""
        chosen = [f"trainer={how.trainer or self.sizes.trainer}", f"trainer.precision={how.precision}"]
        chosen += ["trainer.devices=1", "trainer.enable_progress_bar=false", "name=gpu", *words]
        with initialize_config_dir(str(conf()), version_base="1.3"):
            return settings_of(compose("distill", ["experiment=cifar10", f"network={self.sizes.network}", *chosen]))

    def fitted(self, module: DenoisingModule, how: Variant, case: speed.Case, settings: Distill) -> DeviceClock:
        """The module's steps, as a stage of a run makes them."""
        used = [module.denoiser, getattr(module, "teacher", None)]
        for ema in module.emas:
            prepare(ema.network, replace(how, compiled=False), self.sizes)
        for part in filter(None, used):
            prepare(part.network, how, self.sizes)
        clock = DeviceClock(self.sizes.device)
        speed.fitted(module, self.data(), case, clock, partial(instantiate, settings.trainer))
        return clock

    def case(self, batch: int, updates: int) -> speed.Case:
        return speed.Case(self.sizes.network, SIZE, CHANNELS, batch, updates, 1, 1, 1, 0.0)

    # ---- speed

    def steps(self, batch: int, how: Variant) -> dict[str, Any]:
        """Updates of a teacher, of a student, and of a teacher by a bare loop."""
        fresh(how.tf32)
        rate = matmul_flops(self.sizes)
        case, settings = self.case(batch, self.sizes.batches[batch]), self.settings(how)
        training, distillation = settings.training, settings.distillation
        training.batch_size = distillation.batch_size = batch
        recipes = [Recipe(section, instantiate(settings.weighting)) for section in (training, distillation)]
        stage = Stage(index=1, num_steps=8, teacher=0, teacher_steps=2, updates=case.steps + speed.WARM_UP + 1)

        def teacher() -> list[float]:
            return self.fitted(TeacherModule(self.model(), recipes[0]), how, case, settings).seconds()

        def student() -> list[float]:
            module = DistillationModule(self.model(), stage, recipes[1])
            return self.fitted(module, how, case, settings).seconds()

        def bare() -> list[float]:
            model = self.model().to(self.sizes.device)
            set_dropout(model.network, training.dropout)
            prepare(model.network, how, self.sizes)
            clock = DeviceClock(self.sizes.device)
            return speed.bare(model, self.data(), case, clock, lambda: how.autocast(self.sizes.device))

        one = self.flops_of_a_pass()
        found: dict[str, Any] = {"matmul_flops": rate, "flops_of_a_pass": one, "batch": batch, "updates": case.steps}
        passes = {"teacher": TEACHER_PASSES, "bare": TEACHER_PASSES, "distillation": DISTILLATION_PASSES}
        for name, measure in {"teacher": teacher, "bare": bare, "distillation": student}.items():
            seconds, peak = with_peak(measure)
            median = statistics.median(seconds)
            used = passes[name] * one * batch / median / rate
            found[name] = {"seconds": median, "images_per_second": batch / median, "peak_gib": peak}
            found[name] |= {"utilisation": used, "all_seconds": seconds}
        return found

    def flops_of_a_pass(self) -> int:
        """FLOPs of the network for one image, counted without computing them."""
        network = self.model().network.to("meta")
        z, t = torch.empty(1, CHANNELS, SIZE, SIZE, device="meta"), torch.empty(1, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(z, t)
        return counter.get_total_flops()

    # ---- sampling

    def samplers(self, how: Variant) -> dict[str, Any]:
        """Images/s of `sample` and of a diffusers pipeline of the same student, both to arrays on the CPU."""
        fresh(how.tf32)
        device, count, found = self.sizes.device, self.sizes.sampled, {}
        for steps in SAMPLED_STEPS:
            student = self.model().eval()
            student.num_steps = steps
            with tempfile.TemporaryDirectory() as folder:
                student.save(Path(folder, "student"), grid=steps)
                pipeline: Any = DiffusionPipeline.from_pretrained(str(Path(folder, "student")))
            pipeline.to(device).set_progress_bar_config(disable=True)
            student.to(device)

            def ours(student: Denoiser = student, steps: int = steps) -> None:
                noise = torch.randn(count, CHANNELS, SIZE, SIZE, device=device)
                with how.autocast(device):
                    images = sample(student, noise, steps)
                (images / 2 + 0.5).clamp(0, 1).float().cpu().permute(0, 2, 3, 1).numpy()

            def theirs(pipeline: Any = pipeline, steps: int = steps) -> None:
                with how.autocast(device):
                    pipeline(batch_size=count, num_inference_steps=steps, output_type="np")

            sides = [partial(speed.timed, side, 1) for side in (ours, theirs)]
            for side in sides:  # warms up
                side()
            a, b = speed.in_turns(*sides, self.sizes.samplings, f"{steps} steps")
            rates = [count / statistics.median(seconds) for seconds in (a, b)]
            found[str(steps)] = {"ours": rates[0], "diffusers": rates[1], "batch": count}
        return found

    # ---- parity

    def losses(self, how: Variant) -> dict[str, Any]:
        """Of a teacher's first updates, from one seed, without dropout, which a compiled network draws otherwise."""
        fresh(how.tf32)
        settings = self.settings(how, "training.dropout=0.0")
        settings.training.batch_size = self.sizes.parity_batch
        recipe = Recipe(settings.training, instantiate(settings.weighting))
        case = self.case(self.sizes.parity_batch, self.sizes.parity_updates - speed.WARM_UP - 1)
        clock = self.fitted(TeacherModule(self.model(), recipe), how, case, settings)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return {"losses": torch.stack(clock.losses).float().tolist(), "data": self.data().name}


def with_peak(measure: Callable[[], Any]) -> tuple[Any, float | None]:
    """What it gives, and the GiB of a GPU that tensors took at most meanwhile; None on a CPU."""
    gc.collect()
    if not torch.cuda.is_available():
        return measure(), None
    torch.cuda.reset_peak_memory_stats()
    found = measure()
    return found, torch.cuda.max_memory_allocated() / GIB


def matmul_flops(sizes: Sizes) -> float:
    """FLOP/s of a large product of bf16 matrices: what this device can do."""
    n, device = sizes.matmul, sizes.device
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()

    speed.timed(product, 3)
    return 2 * n**3 / statistics.median(speed.timed(product, 10))
