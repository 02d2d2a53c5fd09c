"""Weights on the mean squared error in x, as functions of logsnr (paper, Section 4).

SNR = exp(logsnr) = alpha^2 / sigma^2. All take and return tensors of one shape.
"""

from collections.abc import Callable

import torch
from torch import Tensor


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


def weighted_loss(weighting: Callable[[Tensor], Tensor], x_hat: Tensor, x: Tensor, logsnr: Tensor) -> Tensor:
    """w(logsnr) times the mean squared error in x, per example: (B, C, H, W) twice and (B,) -> (B,)."""
    return weighting(logsnr) * (x_hat - x).square().mean(dim=(1, 2, 3))
