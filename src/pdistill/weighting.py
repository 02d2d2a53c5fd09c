"""Weights on the mean squared error in x, as functions of logsnr (paper, Section 4).

SNR = exp(logsnr) = alpha^2 / sigma^2. All take and return tensors of one shape.
"""

import torch
from torch import Tensor


def snr(logsnr: Tensor) -> Tensor:
    """SNR: the squared error in eps."""
    return logsnr.exp()


def truncated_snr(logsnr: Tensor) -> Tensor:
    """max(SNR, 1): the larger of the squared errors in x and in eps."""
    return logsnr.exp().clamp(min=1)


def snr_plus_one(logsnr: Tensor) -> Tensor:
    """SNR + 1: the squared error in v."""
    return logsnr.exp() + 1


def constant(logsnr: Tensor) -> Tensor:
    """1: the squared error in x."""
    return torch.ones_like(logsnr)
