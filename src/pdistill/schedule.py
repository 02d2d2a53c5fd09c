"""Noise processes and schedules: how much signal is left at time t.

z_t = alpha_t x + sigma_t eps, with logsnr_t = log(alpha_t^2 / sigma_t^2); t = 0 is data, t = 1 is noise. A schedule
gives logsnr(t); its process says what alpha and sigma are at a log-SNR:

    variance preserving   alpha = sqrt sigmoid(logsnr)   sigma = sqrt sigmoid(-logsnr)     alpha^2 + sigma^2 = 1
    flow matching         alpha = sigmoid(logsnr / 2)    sigma = sigmoid(-logsnr / 2)      alpha + sigma = 1
    variance exploding    alpha = 1                      sigma = exp(-logsnr / 2)
"""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pdistill.registry import arguments_of

AlphaSigma = Callable[[Tensor], tuple[Tensor, Tensor]]


def variance_preserving(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) = sqrt sigmoid(+-logsnr), exact at +-inf."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def flow_matching(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) = sigmoid(+-logsnr / 2), exact at +-inf: z = (1 - u) x + u eps with u = sigma."""
    return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)


def variance_exploding(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) = (1, exp(-logsnr / 2))."""
    return torch.ones_like(logsnr), torch.exp(-logsnr / 2)


class Schedule(ABC):
    """What every schedule has; a subclass gives `__call__(t) -> logsnr`, and `alpha_sigma` if it is another process.

    A dataclass's fields are its `state`, from which storage builds it again: `type(schedule)(**schedule.state())`.
    """

    noise_scale: float = 1.0  # z_1 = noise_scale x unit noise

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """t in [0, 1], any shape -> logsnr of that shape, falling."""

    def alpha_sigma(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at a log-SNR, of its shape."""
        return variance_preserving(logsnr)

    def timestep(self, t: Tensor) -> Tensor:
        """What the network sees of time: 1000 atan(sigma / alpha) 2 / pi, in [0, 1000], under every process."""
        return timestep_of(self(t))

    def training_time(self, u: Tensor) -> Tensor:
        """Uniform u in [0, 1] -> the times that a teacher trains on, of that shape."""
        return u

    def state(self) -> dict[str, object]:
        """The arguments that make this schedule again."""
        return arguments_of(self)


def _as_floats(schedule: object) -> None:
    """The fields of a frozen dataclass as floats: a command line says infinity as text, "-inf" or "-.inf"."""
    for field in dataclasses.fields(schedule):  # type: ignore[arg-type]
        value = getattr(schedule, field.name)
        if field.type == "float" or field.type is float:
            object.__setattr__(schedule, field.name, float(str(value).replace(".inf", "inf")))


def timestep_of(logsnr: Tensor) -> Tensor:
    """1000 atan(sigma / alpha) 2 / pi, with sigma / alpha = exp(-logsnr / 2): in [0, 1000], finite everywhere."""
    return 1000 * torch.atan(torch.exp(-0.5 * logsnr)) / (0.5 * math.pi)


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """logsnr(t) = -2 log tan(a t + b), with a and b such that it runs from logsnr_max to logsnr_min.

    Both ends are exact in floating point: `logsnr_min=-inf` gives zero terminal SNR, not nearly zero.
    Paper, Section 2 and Appendix; the paper clips at [-20, 20]. Raises ValueError where the ends are in the wrong
    order.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        _as_floats(self)
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


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Flow matching: z = (1 - u) x + u eps, u = shift t / (1 + (shift - 1) t); logsnr = 2 log((1 - u) / u).

    Zero SNR exactly at t = 1 (`logsnr_min` above -inf cuts it off), capped at `logsnr_max` near data. Lipman et al.,
    2023; the shift is that of Esser et al., 2024. Raises ValueError for a shift that is not positive.
    """

    shift: float = 1.0
    logsnr_min: float = -math.inf
    logsnr_max: float = 20.0
    train_timesteps: int | None = None
    """Of an imported network, which sees train_timesteps x u of time."""

    def __post_init__(self) -> None:
        _as_floats(self)
        if not self.shift > 0:
            raise ValueError(f"shift={self.shift} must be positive")
        if not self.logsnr_min < self.logsnr_max:
            raise ValueError(f"logsnr_min={self.logsnr_min} must be below logsnr_max={self.logsnr_max}")

    def __call__(self, t: Tensor) -> Tensor:
        """t in [0, 1], any shape -> logsnr of that shape."""
        # (1 - u) / u = (1 - t) / (shift t), with no difference of nearly equal numbers near t = 1
        return (2 * torch.log((1 - t) / (self.shift * t))).clamp(self.logsnr_min, self.logsnr_max)

    def alpha_sigma(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) with alpha + sigma = 1."""
        return flow_matching(logsnr)

    def timestep(self, t: Tensor) -> Tensor:
        """1000 atan(sigma / alpha) 2 / pi, or, of an imported network, train_timesteps x u."""
        if self.train_timesteps is None:
            return super().timestep(t)
        return self.train_timesteps * self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class EdmSchedule(Schedule):
    """Variance exploding: z = x + sigma eps, sigma(t) = (t sigma_max^(1/rho) + (1 - t) sigma_min^(1/rho))^rho.

    Karras et al., 2022, Table 1 and Equation 5. A teacher trains on log-normal sigmas, ln sigma ~ N(mean, std^2), kept
    within [sigma_min, sigma_max]. Raises ValueError for sigmas that are not 0 < sigma_min < sigma_max < inf: with
    infinite noise, z = x + sigma eps is no number.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _as_floats(self)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must be 0 < sigma_min < sigma_max < inf: "
                f"variance exploding has no zero terminal SNR"
            )

    @property
    def noise_scale(self) -> float:  # type: ignore[override]
        """sigma(1): samplers start from noise of this deviation."""
        return self.sigma_max

    def __call__(self, t: Tensor) -> Tensor:
        """t in [0, 1], any shape -> logsnr of that shape."""
        low, high = (sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max))
        return -2 * self.rho * torch.log(t * high + (1 - t) * low)

    def alpha_sigma(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """(1, exp(-logsnr / 2))."""
        return variance_exploding(logsnr)

    def training_time(self, u: Tensor) -> Tensor:
        """The time at which sigma is the u-quantile of the log-normal."""
        low, high = (sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max))
        normal = math.sqrt(2) * torch.erfinv((2 * u.double() - 1).clamp(-1 + 1e-9, 1 - 1e-9))
        sigma = torch.exp(self.mean + self.std * normal).clamp(self.sigma_min, self.sigma_max)
        return ((sigma ** (1 / self.rho) - low) / (high - low)).clamp(0, 1).to(u.dtype)


@dataclass(frozen=True)
class BetaSchedule(Schedule):
    """The schedule of discrete betas that an imported network was trained with; variance preserving.

    `alphas_cumprod` are its T values of alpha^2, falling; its index k is t = (k + 1) / T. Between them log-SNR is
    interpolated linearly in t, below 1 / T extrapolated; where the last value is 0, log-SNR falls to -inf in the last
    interval. The network sees the timestep T t - 1, not below 0. Raises ValueError for values that do not fall from
    below 1 to 0 or above.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas_cumprod", tuple(self.alphas_cumprod))
        values = self.alphas_cumprod
        if len(values) < 2 or not (values[0] < 1 and values[-1] >= 0) or not all(a > b for a, b in pairwise(values)):
            raise ValueError("alphas_cumprod must be at least two values that fall from below 1, to 0 or above")

    def __call__(self, t: Tensor) -> Tensor:
        """t in [0, 1], any shape -> logsnr of that shape."""
        position = t.double() * len(self.alphas_cumprod) - 1  # in indices; -1 at t = 0
        k = position.floor().clamp(0, len(self.alphas_cumprod) - 2).long()
        nodes = _logits(self.alphas_cumprod, t.device)
        here, there, share = nodes[k], nodes[k + 1], position - k
        to_nothing = here + 2 * torch.log1p(-share.clamp(max=1))
        logsnr = torch.where(there.isinf(), to_nothing, here + share * (there - here).nan_to_num(neginf=0))
        return logsnr.to(t.dtype)

    def timestep(self, t: Tensor) -> Tensor:
        """T t - 1, not below 0."""
        return (t * len(self.alphas_cumprod) - 1).clamp(min=0)


@dataclass(frozen=True)
class DiscreteBetaSchedule(BetaSchedule):
    """BetaSchedule at its T times alone: at t everything is as at index round(T t) - 1, not below 0.

    These are diffusers' trailing timesteps, so that at t = i/N its pipelines and `sample` ask a network the same, also
    where N does not divide T.
    """

    def __call__(self, t: Tensor) -> Tensor:
        """t in [0, 1], any shape -> logsnr of that shape, a staircase."""
        return _logits(self.alphas_cumprod, t.device)[self._index(t)].to(t.dtype)

    def timestep(self, t: Tensor) -> Tensor:
        """The index, a whole number."""
        return self._index(t).to(t.dtype)

    def _index(self, t: Tensor) -> Tensor:
        # float32 knows 1/80 to 1e-9 alone: first to the nearest 2^-10, then a half to the even side, as numpy does
        position = (t.double() * len(self.alphas_cumprod) * 1024).round() / 1024
        return position.round().long().clamp(min=1) - 1


@functools.lru_cache(16)
def _logits(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once for each device: a training step must not wait for a copy."""
    with torch.inference_mode(False):
        return torch.logit(torch.tensor(values, dtype=torch.float64)).to(device)


def logsnr_on_grid(schedule: Callable[[Tensor], Tensor], i: Tensor, num_steps: int) -> Tensor:
    """logsnr at t = i / num_steps, for integer i; +inf at i = 0, where samplers end on clean data.

    The paper's samplers and distillation target take alpha = 1, sigma = 0 at t = 0, whatever the
    schedule's own value there.
    """
    return torch.where(i > 0, schedule(i / num_steps), math.inf)


def betas(schedule: Callable[[Tensor], Tensor], num_steps: int) -> list[float]:
    """The schedule in diffusers' words: 1 - abar_i / abar_{i-1} on the grid of `num_steps`, abar = sigmoid(logsnr)."""
    grid = torch.arange(num_steps + 1, dtype=torch.float64)
    abar = torch.sigmoid(logsnr_on_grid(schedule, grid, num_steps))
    return (1 - abar[1:] / abar[:-1]).clamp(max=1 - 2**-24).tolist()  # a float32 beta of 1 makes log(0)
