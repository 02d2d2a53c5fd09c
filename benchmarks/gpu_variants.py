"""How large what benchmarks/gpu.py measures is, and the ways to compute it."""

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Sizes:
    """How large everything is: `REAL`, or the toy of a rehearsal."""

    trainer: str
    """Of conf/trainer: it says the device."""
    ddp: str
    network: str
    size: int
    """Pixels of an image's side."""
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
    """Of torch.compile; on a CPU its aot_eager expects strides that dropout does not give to channels_last."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.trainer == "gpu" else "cpu")


REAL = Sizes("gpu", "ddp", "cifar10", 32, {128: 20, 512: 5}, 512, 10, 8192, 64, 200, "inductor")
TOY = Sizes("cpu", "ddp_cpu", "digits", 8, {4: 2, 8: 2}, 4, 2, 128, 4, 5, "eager")


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
    """Lays out and compiles a network in place: what the project's own settings do to it, for a bare loop too.

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


def in_its_precision(network: nn.Module, how: Variant, device: torch.device) -> None:
    """The network alone computes in bf16, where that is asked for, and gives float32 all the same."""
    before = network.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        with how.autocast(device):
            output: Any = before(*inputs, **options)
        output.sample = output.sample.float()
        return output

    network.forward = forward


def fresh(tf32: bool) -> None:
    """Nothing is left of what was measured before, and float32 is computed as it is asked for."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
