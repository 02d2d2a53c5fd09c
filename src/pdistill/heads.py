"""Several step counts in one network: its last layer is repeated, one head for each interval of a grid of times.

What parallel decoding trains (PDD, 2607.26004). All heads see the features of one evaluation at the start of a block of
intervals, and each says what the deterministic sampler's step over its own interval would take. The steps of a block
compose to one, whose x_hat is a mean of the heads'. The last layer is linear and x_hat affine in its output, so
that the heads of a block fuse into one.
"""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from pdistill import network as networks
from pdistill import registry
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.parameterization import Parameterization
from pdistill.schedule import Schedule, logsnr_on_grid

Mean = Literal["x", "velocity"]


@dataclass(frozen=True)
class Heads:
    """The output is K images (B, K C, H, W), head j for times from where `ratios[j]` is alpha / sigma.

    At a time it is read by the head whose interval starts there. `of` is the parameterization of every head, by its
    registered name, or a dict of that and its arguments. `counts` are the step counts that `fused` makes of it.

    `mean` is what a block's heads are averaged in. With rho = alpha / sigma, z / sigma moves by x_hat d(rho), so that
    heads which predict x_hat have the weights rho_{j+1} - rho_j: at the end of time the last head has all. With u =
    sigma / (alpha + sigma), z / (alpha + sigma) moves by the velocity (z / (alpha + sigma) - x_hat) / u times du, so
    that heads which predict that have the weights u_j - u_{j+1}, finite everywhere.
    """

    of: str | dict[str, Any]
    ratios: Sequence[float]
    counts: Sequence[int] = ()
    mean: Mean = "x"
    name = "heads"

    def __post_init__(self) -> None:
        if len(self.ratios) < 1 or any(len(self.ratios) % count for count in self.counts):
            raise ValueError(f"{len(self.ratios)} heads cannot be fused into {list(self.counts)} blocks")

    @cached_property
    def inner(self) -> Parameterization:
        """Of every head."""
        arguments = {"name": self.of} if isinstance(self.of, str) else dict(self.of)
        return registry.find("parameterization", arguments.pop("name"))(**arguments)

    @property
    def stable_at_zero_snr(self) -> bool:
        """As the heads are."""
        return self.inner.stable_at_zero_snr

    def channels(self, image_channels: int) -> int:
        """Those of all heads."""
        return len(self.ratios) * self.inner.channels(image_channels)

    def state(self) -> dict[str, Any]:
        """What makes it again."""
        return {"of": self.of, "ratios": list(self.ratios), "counts": list(self.counts), "mean": self.mean}

    def scale_input(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """As the heads'."""
        scale = getattr(self.inner, "scale_input", None)
        return z if scale is None else scale(z, alpha, sigma)

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_hat of the head that starts nearest to this time."""
        start = table(sigma.dtype, self._u, z.device)[:-1]
        nearest = (sigma.reshape(-1, 1) / (alpha + sigma).reshape(-1, 1) - start).abs().argmin(1)
        return self.inner.to_x(self.mix(output, nearest[:, None] == self._numbers(z)), z, alpha, sigma)

    def mix(self, output: Tensor, weights: Tensor) -> Tensor:
        """The mean (B, C, H, W) of the heads' outputs by `weights` (B or 1, K)."""
        heads = output.unflatten(1, (len(self.ratios), -1))
        return (weights.to(output.dtype)[:, :, None, None, None] * heads).sum(1)

    def weights(self, start: Tensor, stop: Tensor) -> Tensor:
        """Of heads start, ..., stop - 1 (B,) in their mean: (B, K), float64, summing to 1; zeros for an empty block."""
        number = self._numbers(start)
        within = (number >= start[:, None]) & (number < stop[:, None])
        share = torch.where(within, table(torch.float64, self._shares, start.device), 0.0)
        share = torch.where(share.isinf().any(1, keepdim=True), share.isinf().double(), share)
        return share / share.sum(1, keepdim=True).clamp(min=1e-300)

    def _numbers(self, like: Tensor) -> Tensor:
        """(1, K)"""
        return torch.arange(len(self.ratios), device=like.device)[None]

    @cached_property
    def _u(self) -> tuple[float, ...]:
        """sigma / (alpha + sigma) where the intervals start, and 0 at the end: K + 1 numbers."""
        return (*(1 / (1 + ratio) for ratio in self.ratios), 0.0)

    @cached_property
    def _shares(self) -> tuple[float, ...]:
        """How far each interval goes in what is averaged: K numbers."""
        edges = [-u for u in self._u] if self.mean == "velocity" else [*self.ratios, math.inf]
        return tuple(b - a for a, b in pairwise(edges))


def table(dtype: torch.dtype, values: tuple[float, ...], device: torch.device) -> Tensor:
    """(K,), made once for each device: a training step must not wait for a copy. A graph that is traced has its own."""
    make = _table.__wrapped__ if torch.compiler.is_compiling() else _table
    return make(dtype, values, device)


@functools.lru_cache(64)
def _table(dtype: torch.dtype, values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64).to(device, dtype)


def blocks(heads: Heads, num_steps: int) -> Tensor:
    """What each of `num_steps` equal blocks averages the heads by: (num_steps, K), float64."""
    length = len(heads.ratios) // num_steps
    start = torch.arange(0, len(heads.ratios), length)
    return heads.weights(start, start + length)


def ratios_of(schedule: Schedule, grid: int) -> list[float]:
    """alpha / sigma at t = 1, 1 - 1/grid, ..., 1/grid."""
    alpha, sigma = schedule.alpha_sigma(logsnr_on_grid(schedule, torch.arange(grid, 0, -1, dtype=torch.float64), grid))
    return (alpha / sigma).tolist()


def grown(denoiser: Denoiser, grid: int, counts: Sequence[int], mean: Mean = "x") -> Denoiser:
    """One head for each interval of `grid`, all of them the last layer; it shares all other weights.

    Raises UserError for a network whose last layer is not known, and for one with heads of another grid.
    """
    before = denoiser.parameterization
    layer = networks.last_layer(denoiser.network)
    if isinstance(before, Heads):
        if (own := len(before.ratios)) != grid:
            raise UserError(f"a student of {own} heads has no grid of {grid}: start steps.plan at {own}")
        return _with(denoiser, replace(before, counts=tuple(counts), mean=mean), *layer)
    name, arguments = registry.name_of("parameterization", type(before)), registry.state_of(before)
    of: Any = {"name": name, **arguments} if arguments else name
    heads = Heads(of, ratios_of(denoiser.schedule, grid), tuple(counts), mean)
    return _with(denoiser, heads, *(v.repeat(grid, *[1] * (v.ndim - 1)) for v in layer))


def fused(denoiser: Denoiser, num_steps: int) -> Denoiser:
    """The student of `num_steps` that a denoiser with heads holds; it shares all weights but the last layer's.

    One step is a denoiser without heads. Raises ValueError where `num_steps` is not one of its counts.
    """
    heads = denoiser.parameterization
    if not isinstance(heads, Heads) or num_steps not in heads.counts:
        known = ", ".join(map(str, getattr(heads, "counts", ())))
        raise ValueError(f"this student knows {known} steps, not {num_steps}: give one of these")
    student = _combined(denoiser, blocks(heads, num_steps))
    student.lineage = [*denoiser.lineage, num_steps]
    return student


def first_heads(denoiser: Denoiser, num_steps: int) -> Denoiser:
    """What a student of half the steps, or fewer, starts as: the heads whose times it has."""
    heads = denoiser.parameterization
    if not isinstance(heads, Heads) or len(heads.ratios) % num_steps:
        return denoiser
    return _combined(denoiser, torch.eye(len(heads.ratios), dtype=torch.float64)[:: len(heads.ratios) // num_steps])


def _combined(denoiser: Denoiser, weights: Tensor) -> Denoiser:
    """A head for each row of weights (num_steps, K), float64, whose intervals make up the time in equal parts."""
    heads: Any = denoiser.parameterization
    num_steps = len(weights)
    with torch.no_grad():
        values = [
            torch.einsum("nk,k...->n...", weights.to(v.device), v.double().unflatten(0, (len(heads.ratios), -1)))
            .flatten(0, 1)
            .to(v.dtype)
            for v in networks.last_layer(denoiser.network)
        ]
    ratios = heads.ratios[:: len(heads.ratios) // num_steps]
    student = _with(denoiser, heads.inner if num_steps == 1 else Heads(heads.of, ratios), *values)
    student.num_steps = num_steps
    return student


def _with(denoiser: Denoiser, parameterization: Parameterization, weight: Tensor, bias: Tensor) -> Denoiser:
    """The denoiser with another last layer, and what that means; it shares all other weights."""
    other = copy.copy(denoiser)
    other._modules = dict(denoiser._modules)
    other.network = networks.with_last_layer(denoiser.network, weight, bias)
    other.parameterization = parameterization
    return other
