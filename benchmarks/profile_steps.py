"""Where the time of a training step goes, and the least that it could take: `python benchmarks/profile_steps.py`.

Of the teacher's step and of the distillation's: torch's profile by kinds of operations, a floor, and the peak of
memory. The floor is what convolutions and matrix products take at the rate of this machine, measured in this process,
and what all other operations take to read and write their tensors at the bandwidth of its memory.
"""

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from speed import WARM_UP, Case, machine, new_denoiser
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pdistill.dataset import ImageSet
from pdistill.dataset.batches import to_float
from pdistill.errors import Interrupted
from pdistill.steps import Stage
from pdistill.training.data import ImageDataModule
from pdistill.training.distillation import DistillationModule
from pdistill.training.execution import running
from pdistill.training.fit import FitSettings, fit
from pdistill.training.module import DenoisingModule, Recipe
from pdistill.training.settings import Distillation, Execution, Training
from pdistill.training.teacher import TeacherModule
from pdistill.weighting import truncated_snr

CASES = {
    "digits": Case("digits", 8, 1, batch=64, steps=20, rounds=1, evaluations=0, samplings=0, limit=0),
    "cifar10": Case("cifar10", 32, 3, batch=4, steps=2, rounds=1, evaluations=0, samplings=0, limit=0),
}
KINDS = {  # by parts of the names of operations, the first that fits
    "convolutions": ("conv",),
    "matrix products, attention": ("mm", "linear", "attention", "attn", "matmul"),
    "normalisation": ("norm",),
    "activations": ("silu", "softmax"),
    "optimizer, averages": ("adamw", "lerp"),
}
OTHER = "everything else in torch"
OUTSIDE = "Lightning, Python"
FREE = ("view", "reshape", "expand", "permute", "transpose", "select", "slice", "detach", "empty", "alias", "unsqueeze")


def kind_of(operation: str) -> str:
    names = ((kind, part) for kind, parts in KINDS.items() for part in parts)
    return next((kind for kind, part in names if part in operation.lower()), OTHER)


class Tensors(TorchDispatchMode):
    """Counts what operations read and write, and what lives at once."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.peak = 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func.__name__
        if kind_of(name) not in ("convolutions", "matrix products, attention") and not name.startswith(FREE):
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.nbytes for tensor in (*read, *written))
        for tensor in written:
            self.keep(tensor)
        self.live = {key: kept for key, kept in self.live.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result

    def keep(self, tensor: Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self.live[reference.cdata] = reference, tensor.untyped_storage().nbytes()


def steps_of(case: Case, execution: Execution) -> Iterator[tuple[str, DenoisingModule]]:
    model, stage = new_denoiser(case), Stage(1, 8, 0, 2, case.steps + WARM_UP + 1)
    settings = Training(batch_size=case.batch, ema_decay=None, warmup_updates=0)
    yield "teacher", TeacherModule(copy.deepcopy(model), Recipe(settings, truncated_snr, execution=execution))
    recipe = Recipe(Distillation(batch_size=case.batch), truncated_snr, execution=execution)
    yield "distillation", DistillationModule(copy.deepcopy(model), stage, recipe)


class Profile(Callback):
    """torch's profile of the steps after those that warm up, and the seconds of the same number before it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) == WARM_UP + self.steps + 1:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.start()
        elif len(self.ends) == WARM_UP + 2 * self.steps + 1:
            self.profiler.stop()

    @property
    def seconds(self) -> float:
        """Of a step that is not profiled, which would be slower."""
        return (self.ends[WARM_UP + self.steps] - self.ends[WARM_UP]) / self.steps

    @property
    def profiled(self) -> float:
        return (self.ends[-1] - self.ends[WARM_UP + self.steps]) / self.steps


def profiled(module: DenoisingModule, data: ImageSet, case: Case) -> Profile:
    watch = Profile(case.steps)
    with tempfile.TemporaryDirectory() as directory:
        settings = FitSettings(
            directory=Path(directory) / "stage",
            prefix="profile",
            updates=WARM_UP + 2 * case.steps + 1,
            num_steps=8,
            trainer=partial(Trainer, accelerator="cpu", devices=1, log_every_n_steps=50),
            callbacks=[watch],
            checkpoint_every_n_updates=10**9,
            progress_bar=False,
        )
        fit(module, ImageDataModule(data, case.batch, seed=0, stage=module.stage_index), settings)
    return watch


def counted(module: DenoisingModule, case: Case) -> dict[str, float]:
    """FLOPs of a step, bytes that its other operations move, and its peak of memory, all of one update."""
    optimizer = module.configure_optimizers()["optimizer"]
    images = torch.randint(0, 256, (case.batch, case.channels, case.size, case.size), dtype=torch.uint8)
    batch = {"image": to_float(images)}

    def step() -> None:
        losses, _ = module.losses(batch)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(module.denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with FlopCounterMode(display=False) as flops:
        step()
    tensors = Tensors()
    for value in (*module.parameters(), *module.buffers(), *tree_leaves(list(optimizer.state.values()))):
        if isinstance(value, Tensor):
            tensors.keep(value)
    with tensors:
        step()
    return {"flops": flops.get_total_flops(), "moved": tensors.moved, "peak": tensors.peak}


def rates(case: Case, channels: int) -> dict[str, float]:
    """FLOP/s of a matrix product and of a 3x3 convolution of the network's size, and bytes/s of copying."""
    a = torch.randn(1024, 1024)
    image, layer = torch.randn(case.batch, channels, case.size, case.size), torch.nn.Conv2d(channels, channels, 3, 1, 1)
    large, copied = torch.randn(2**25), torch.empty(2**25)

    @torch.inference_mode()
    def fastest(call: Any, least: float = 0.3) -> float:
        seconds, until = [], time.perf_counter() + least
        while len(seconds) < 4 or time.perf_counter() < until:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    return {
        "matrix products": 2 * 1024**3 / fastest(lambda: a @ a),
        "convolutions": 2 * 9 * channels**2 * case.size**2 * case.batch / fastest(lambda: layer(image)),
        "memory": 2 * large.nbytes / fastest(lambda: copied.copy_(large)),
    }


def by_kind(watch: Profile) -> tuple[dict[str, float], list[tuple[str, float, float]]]:
    """Milliseconds of a step by kinds of operations, and the dearest operations with their calls."""
    kinds: dict[str, float] = defaultdict(float)
    operations = []
    for row in watch.profiler.key_averages():
        milliseconds = row.self_cpu_time_total / 1000 / watch.steps
        if row.key.startswith(("aten::", "fused")):
            kinds[kind_of(row.key)] += milliseconds
            operations.append((row.key, milliseconds, row.count / watch.steps))
    kinds[OUTSIDE] = 1000 * watch.profiled - sum(kinds.values())
    return kinds, sorted(operations, key=lambda row: -row[1])


def line(what: str, cells: list[str]) -> None:
    print(f"| {what} | {' | '.join(cells)} |")


def report(case: Case, top: int) -> None:
    data = ImageSet("noise", torch.randint(0, 256, (512, case.channels, case.size, case.size), dtype=torch.uint8))
    channels = new_denoiser(case).network.config["block_out_channels"][0]
    rate = rates(case, channels)
    print(f"\n## {case.network}, {case.batch} images of {case.channels}x{case.size}x{case.size}\n")
    print(
        f"{rate['convolutions'] / 1e9:.1f} GFLOP/s in convolutions, {rate['matrix products'] / 1e9:.1f} in matrix "
        f"products, {rate['memory'] / 1e9:.1f} GB/s in copying\n"
    )
    seconds, peaks, weights, tables = {}, {}, 0, {}
    for name, module in steps_of(case, Execution()):
        count = counted(module, case)
        watch = profiled(module, data, case)
        kinds, operations = by_kind(watch)
        seconds[name], peaks[name], tables[name] = watch.seconds, count["peak"], (kinds, count, operations)
        weights = sum(p.nbytes for p in module.denoiser.parameters())
    print("| ms of a step | " + " | ".join(tables) + " |\n| --- |" + " ---: |" * len(tables))
    for kind in (*KINDS, OTHER, OUTSIDE):
        line(kind, [f"{kinds.get(kind, 0):.1f}" for kinds, _, _ in tables.values()])
    line("all, not profiled", [f"{1000 * value:.1f}" for value in seconds.values()])
    floors = {
        name: (count["flops"] / rate["convolutions"], count["moved"] / rate["memory"])
        for name, (_, count, _) in tables.items()
    }
    counts, total = [count for _, count, _ in tables.values()], [sum(floors[name]) for name in tables]
    line("GFLOP", [f"{count['flops'] / 1e9:.2f}" for count in counts])
    line("GB of other operations", [f"{count['moved'] / 1e9:.3f}" for count in counts])
    line("floor, ms", [f"{1000 * (a + b):.1f} ({1000 * a:.1f} + {1000 * b:.1f})" for a, b in floors.values()])
    line("step / floor", [f"{a / b:.2f}" for a, b in zip(seconds.values(), total, strict=True)])
    line("peak, MB", [f"{peak / 1e6:.1f}" for peak in peaks.values()])
    checkpointed = []
    for _, module in steps_of(case, Execution(gradient_checkpointing=True)):
        with running(module, mixed=False):
            checkpointed.append(counted(module, case)["peak"])
    line("with gradient_checkpointing=true", [f"{peak / 1e6:.1f}" for peak in checkpointed])
    print()
    allowed = 1 + weights / peaks["teacher"]
    print(f"distillation step / teacher step {seconds['distillation'] / seconds['teacher']:.3f}")
    print(
        f"peak of distillation / peak of teacher training {peaks['distillation'] / peaks['teacher']:.3f}, "
        f"with one copy of the weights {allowed:.3f}"
    )
    for name, (_, _, operations) in tables.items():
        print(f"\n{name}: " + ", ".join(f"{k} {ms:.1f} ms ({n:.0f})" for k, ms, n in operations[:top]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(CASES), help="this one alone")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="operations that are listed")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{machine()['processor']}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    for name, case in CASES.items():
        if options.network in (None, name):
            report(case, options.top)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, Interrupted):
        sys.exit("stopped: what was measured stands above")
