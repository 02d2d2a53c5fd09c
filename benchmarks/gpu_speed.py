"""What benchmarks/gpu.py measures in its own process: steps of training, sampling, and losses of equal seeds.

The loops are those of benchmarks/speed.py. Steps are timed by the device's own events, and their median counts.
"""

import copy
import gc
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import speed
import torch
from diffusers import DiffusionPipeline
from gpu_variants import Sizes, Variant, fresh, in_its_precision, prepare
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
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
CHANNELS = 3
TEACHER_PASSES, DISTILLATION_PASSES = 3, 5  # forward passes' worth of an update; going back counts for two
SAMPLED_STEPS = (1, 2, 4, 8)


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

    @property
    def shape(self) -> tuple[int, int, int]:
        return CHANNELS, self.sizes.size, self.sizes.size

    @cached_property
    def _model(self) -> Denoiser:
        return speed.new_denoiser(self.case(1, 1))

    def model(self) -> Denoiser:
        """A fresh one, the same each time."""
        return copy.deepcopy(self._model)

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
        return speed.Case(self.sizes.network, self.sizes.size, CHANNELS, batch, updates, 1, 1, 1, 0.0)

    # ---- speed

    def steps(self, batch: int, how: Variant) -> dict[str, Any]:
        """Updates of a teacher, of a student, and of a teacher by a bare loop."""
        fresh(how.tf32)
        rate = matmul_flops(self.sizes)
        case = self.case(batch, self.sizes.batches[batch])
        settings = self.settings(how, f"training.batch_size={batch}", f"distillation.batch_size={batch}")
        sections = settings.training, settings.distillation
        recipes = [Recipe(section, instantiate(settings.weighting)) for section in sections]
        stage = Stage(index=1, num_steps=8, teacher=0, teacher_steps=2, updates=case.steps + speed.WARM_UP + 1)

        def teacher() -> list[float]:
            return self.fitted(TeacherModule(self.model(), recipes[0]), how, case, settings).seconds()

        def student() -> list[float]:
            module = DistillationModule(self.model(), stage, recipes[1])
            return self.fitted(module, how, case, settings).seconds()

        def bare() -> list[float]:
            model = self.model().to(self.sizes.device)
            set_dropout(model.network, settings.training.dropout)
            prepare(model.network, how, self.sizes)
            clock = DeviceClock(self.sizes.device)
            return speed.bare(model, self.data(), case, clock, lambda: how.autocast(self.sizes.device))

        one = self.flops_of_a_pass
        found: dict[str, Any] = {"matmul_flops": rate, "flops_of_a_pass": one, "batch": batch, "updates": case.steps}
        passes = {"teacher": TEACHER_PASSES, "bare": TEACHER_PASSES, "distillation": DISTILLATION_PASSES}
        for name, measure in {"teacher": teacher, "bare": bare, "distillation": student}.items():
            try:
                seconds, peak = with_peak(measure)
            except torch.OutOfMemoryError:
                found[name] = {"error": "out of memory"}
                continue
            median = statistics.median(seconds)
            used = passes[name] * one * batch / median / rate
            found[name] = {"seconds": median, "images_per_second": batch / median, "peak_gib": peak}
            found[name] |= {"utilisation": used, "all_seconds": seconds}
        return found

    @cached_property
    def flops_of_a_pass(self) -> int:
        """FLOPs of the network for one image, counted without computing them."""
        network = self.model().network.to("meta")
        z, t = torch.empty(1, *self.shape, device="meta"), torch.empty(1, device="meta")
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
            for network in (student.network, pipeline.unet):
                in_its_precision(network, how, device)

            def ours(student: Denoiser = student, steps: int = steps) -> None:
                images = sample(student, torch.randn(count, *self.shape, device=device), steps)
                (images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()

            def theirs(pipeline: Any = pipeline, steps: int = steps) -> None:
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
        settings = self.settings(how, "training.dropout=0.0", "training.warmup_updates=20")
        recipe = Recipe(settings.training, instantiate(settings.weighting))
        case = self.case(self.sizes.parity_batch, self.sizes.parity_updates - speed.WARM_UP - 1)
        model = self.model()
        torch.nn.init.zeros_(model.network.get_parameter("conv_out.weight"))  # as a training begins
        clock = self.fitted(TeacherModule(model, recipe), how, case, settings)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return {"losses": torch.stack(clock.losses).float().tolist(), "data": self.data().name}


def with_peak(measure: Callable[[], Any]) -> tuple[Any, float | None]:
    """What it gives, and the GiB of a GPU that tensors took at most meanwhile; None on a CPU."""
    gc.collect()
    if not torch.cuda.is_available():
        return measure(), None
    torch.cuda.empty_cache()
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
