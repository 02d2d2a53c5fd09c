"""Noise schedules: the log signal-to-noise ratio as a function of time.

z_t = alpha_t x + sigma_t eps with alpha_t^2 + sigma_t^2 = 1 and logsnr_t = log(alpha_t^2 / sigma_t^2).
t = 0 is data, t = 1 is noise.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CosineSchedule:
    """logsnr(t) = -2 log tan(a t + b), with a and b such that it runs from logsnr_max to logsnr_min.

    Both ends are exact in floating point: `logsnr_min=-inf` gives zero terminal SNR, not nearly zero.
    Paper, Section 2 and Appendix; the paper clips at [-20, 20].
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        if not self.logsnr_min < self.logsnr_max:
            raise ValueError(f"logsnr_min={self.logsnr_min} must be below logsnr_max={self.logsnr_max}")

    def __call__(self, t: Tensor) -> Tensor:
        """t in [0, 1], any shape -> logsnr of that shape."""
        at_data = math.atan(math.exp(-0.5 * self.logsnr_max))  # the angle at t = 0
        from_noise = math.atan(math.exp(0.5 * self.logsnr_min))  # pi/2 minus the angle at t = 1
        span = 0.5 * math.pi - at_data - from_noise
        # tan of the angle from the nearer end: near pi/2 it would lose all its digits.
        early = -2 * torch.log(torch.tan(span * t.clamp(max=0.5) + at_data))
        late = 2 * torch.log(torch.tan(span * (1 - t.clamp(min=0.5)) + from_noise))
        return torch.where(t < 0.5, early, late)


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of a variance-preserving process: sqrt sigmoid(+-logsnr), exact at +-inf."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def logsnr_on_grid(schedule, i: Tensor, num_steps: int) -> Tensor:
    """logsnr at t = i / num_steps, for integer i; +inf at i = 0, where samplers end on clean data.

    The paper's samplers and distillation target take alpha = 1, sigma = 0 at t = 0, whatever the
    schedule's own logsnr_max.
    """
    return torch.where(i > 0, schedule(i / num_steps), math.inf)


def betas(schedule: CosineSchedule, num_steps: int) -> list[float]:
    """The schedule in diffusers' words: 1 - abar_i / abar_{i-1} on the grid of `num_steps`, abar = alpha^2."""
    grid = torch.arange(num_steps + 1, dtype=torch.float64)
    abar = torch.sigmoid(logsnr_on_grid(schedule, grid, num_steps))
    return (1 - abar[1:] / abar[:-1]).clamp(max=1 - 2**-24).tolist()  # a float32 beta of 1 makes log(0)
