"""Randomness as a function of a key, so that nothing depends on how often a run was restarted.

A key is a purpose word and non-negative integers, such as ("training", seed, stage, step, rank). Equal keys give equal
numbers, and the word keeps those of different purposes apart; there is no generator state to save or restore.
"""

import hashlib
from collections.abc import Iterable

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


def sample_noise(seed: int, indices: Iterable[int], shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """Standard normal noise (B, *shape) in which image i depends on (seed, i, draw) alone.

    A picture is therefore the same whatever batch, or process, it is drawn in. `draw` tells apart the
    initial noise (0) and the step noises of a stochastic sampler (1, 2, ...). Drawn on the CPU.
    """
    return torch.stack([torch.randn(shape, generator=generator("sample", seed, i, draw)) for i in indices])
