"""Weights on the mean squared error in x, as functions of logsnr (paper, Section 4); and other distances than that.

SNR = exp(logsnr) = alpha^2 / sigma^2. Weights take and return tensors of one shape; distances take images
(B, C, H, W) twice and return (B,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def snr(logsnr: Tensor) -> Tensor:
    """SNR: the squared error in eps."""
    return logsnr.exp()


def truncated_snr(logsnr: Tensor) -> Tensor:
    """max(SNR, 1): the larger of the squared errors in x and in eps."""
    return logsnr.exp().clamp(min=1)


def snr_plus_one(logsnr: Tensor) -> Tensor:
    """SNR + 1: the squared error in v of a variance-preserving process."""
    return logsnr.exp() + 1


def min_snr_plus_one(logsnr: Tensor, gamma: float = 10.0) -> Tensor:
    """min(SNR + 1, gamma): Min-SNR of a v network (Hang et al., 2023). Little noise does not drown the other times."""
    return (logsnr.exp() + 1).clamp(max=gamma)


def constant(logsnr: Tensor) -> Tensor:
    """1: the squared error in x."""
    return torch.ones_like(logsnr)


def flow(logsnr: Tensor) -> Tensor:
    """(1 + sqrt(SNR))^2: the squared error in the velocity of flow matching, where alpha + sigma = 1."""
    return (1 + (logsnr / 2).exp()).square()


def edm(logsnr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """SNR + 1 / sigma_data^2: the weight of Karras et al., 2022, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
    return logsnr.exp() + sigma_data**-2


def squared(x_hat: Tensor, x: Tensor) -> Tensor:
    """The mean squared error, |x_hat - x|^2 / d with d = C H W: the paper's."""
    return (x_hat - x).square().mean(dim=(1, 2, 3))


def l2(x_hat: Tensor, x: Tensor) -> Tensor:
    """The norm |x_hat - x|, not squared (Heek et al., 2024, 2403.06807). Its gradient at 0 is 0."""
    return torch.linalg.vector_norm(x_hat - x, dim=(1, 2, 3))


def pseudo_huber(x_hat: Tensor, x: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|x_hat - x|^2 + c^2) - c, with c = 0.00054 sqrt(d) unless given (Song & Dhariwal, 2023, 2310.14189)."""
    error = (x_hat - x).square().sum(dim=(1, 2, 3))
    if c is None:
        c = 0.00054 * math.sqrt(x[0].numel())
    return error / ((error + c**2).sqrt() + c)  # without the difference of nearly equal numbers


DISTANCES: dict[str, Distance] = {"squared": squared, "l2": l2, "pseudo_huber": pseudo_huber}


@dataclass(frozen=True)
class WithDistance:
    """A weighting, w(logsnr), of another distance than the mean squared error."""

    weighting: Callable[[Tensor], Tensor]
    distance: Distance

    def __call__(self, logsnr: Tensor) -> Tensor:
        return self.weighting(logsnr)


def with_loss(
    weighting: Callable[[Tensor], Tensor], loss: str, huber_c: float | None = None
) -> Callable[[Tensor], Tensor]:
    """The weighting, such that `weighted_loss` takes the distance of that name in DISTANCES."""
    if loss == "squared":
        return weighting
    return WithDistance(weighting, DISTANCES[loss] if huber_c is None else partial(pseudo_huber, c=huber_c))


def weighted_loss(weighting: Callable[[Tensor], Tensor], x_hat: Tensor, x: Tensor, logsnr: Tensor) -> Tensor:
    """w(logsnr) times the mean squared error in x, per example: (B, C, H, W) twice and (B,) -> (B,).

    A weighting that comes with a distance of its own (`with_loss`) weighs that instead.
    """
    distance = weighting.distance if isinstance(weighting, WithDistance) else squared
    return weighting(logsnr) * distance(x_hat, x)
