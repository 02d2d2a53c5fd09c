"""Randomness as a function of a key, so that nothing depends on how often a run was restarted.

A key is a purpose word and non-negative integers, such as ("training", seed, stage, step, rank). Equal keys give equal
numbers, and the word keeps those of different purposes apart; there is no generator state to save or restore.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def seed_of(purpose: str, *key: int) -> int:
    """A 63-bit seed for the key."""
    words = " ".join([purpose, *map(str, map(int, key))])
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) >> 1


def generator(purpose: str, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for the key."""
    return torch.Generator(device).manual_seed(seed_of(purpose, *key))


def seed_global_generator(device: torch.device, purpose: str, *key: int) -> None:
    """Seeds the CPU's and the device's global generators, which dropout draws from.

    `torch.manual_seed` would also queue a call for every accelerator that is not in use, at every step.
    """
    torch.default_generator.manual_seed(seed_of(purpose, *key))
    if device.type == "cuda":
        torch.cuda.manual_seed(seed_of(purpose, *key))


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of an update's batch, the `index`-th: of accumulated batches, of several devices."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class _Whole:
    """The numbers of a whole batch, of which a part takes its share."""

    part: Part
    generator: torch.Generator


_whole: _Whole | None = None  # None: all that is drawn is of the batch at hand, from torch's global generator


@contextlib.contextmanager
def drawing(device: torch.device, key: tuple[int, ...], part: Part) -> Iterator[None]:
    """Inside, `uniform`, `integers` and `normal` give a part of a batch what the whole would have drawn there.

    So the result is the same in however many parts a batch is taken. `key` is (seed, stage, update). What is drawn
    otherwise, dropout above all, comes from the global generators, which are seeded for the part: for an undivided
    batch the same numbers follow, for others not.
    """
    global _whole
    if part.count == 1:
        seed_global_generator(device, "training", *key, 0)
        yield
        return
    seed_global_generator(device, "part of a batch", *key, part.index, part.count)
    _whole = _Whole(part, generator("training", *key, 0, device=device))
    try:
        yield
    finally:
        _whole = None


def _share(draw: Callable[[int, torch.Generator | None], Tensor], size: int, dim: int = 0) -> Tensor:
    """`draw(size, generator)`, or, of a part of a batch, its share of what is drawn for the whole."""
    if _whole is None:
        return draw(size, None)
    part = _whole.part
    return draw(part.count * size, _whole.generator).narrow(dim, part.index * size, size)


def uniform(like: Tensor, rows: tuple[int, ...] = (), dtype: torch.dtype | None = None) -> Tensor:
    """(*rows, B) numbers in [0, 1) for a batch whose tensor `like` (B, ...) is."""

    def draw(size: int, random: torch.Generator | None) -> Tensor:
        return torch.rand(*rows, size, device=like.device, dtype=dtype, generator=random)

    return _share(draw, len(like), len(rows))


def integers(low: int, high: int, like: Tensor) -> Tensor:
    """(B,) whole numbers in [low, high) for a batch whose tensor `like` (B, ...) is."""

    def draw(size: int, random: torch.Generator | None) -> Tensor:
        return torch.randint(low, high, (size,), device=like.device, generator=random)

    return _share(draw, len(like))


def normal(like: Tensor) -> Tensor:
    """Standard normal numbers, as many as in the tensor `like` (B, ...) of a batch."""
    if _whole is None:
        return torch.randn_like(like)
    channels_last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format  # in whose order numbers are drawn

    def draw(size: int, random: torch.Generator | None) -> Tensor:
        shape = size, *like.shape[1:]
        empty = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
        return empty.normal_(generator=random)

    return _share(draw, len(like))


def sample_noise(seed: int, indices: Iterable[int], shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """Standard normal noise (B, *shape) in which image i depends on (seed, i, draw) alone.

    A picture is therefore the same whatever batch, or process, it is drawn in. `draw` tells apart the
    initial noise (0) and the step noises of a stochastic sampler (1, 2, ...). Drawn on the CPU.
    """
    return torch.stack([torch.randn(shape, generator=generator("sample", seed, i, draw)) for i in indices])
