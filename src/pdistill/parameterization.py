"""What the network's output means: the one home of every conversion between eps, x and v.

Each class turns the network's output into x_hat, the denoised image (paper, Section 4). `alpha` and
`sigma` must broadcast against the images `z` of shape (B, C, H, W).
"""

from typing import Protocol

import torch
from torch import Tensor


class Parameterization(Protocol):
    """Every parameterization has these; `stable_at_zero_snr` is False if x_hat divides by alpha."""

    name: str
    stable_at_zero_snr: bool

    def channels(self, image_channels: int) -> int: ...

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...


class _OneImage:
    """The output has as many channels as the image."""

    stable_at_zero_snr = True

    def channels(self, image_channels: int) -> int:
        return image_channels


class Eps(_OneImage):
    """The output is eps: x_hat = (z - sigma eps) / alpha, which no distillation survives as alpha -> 0."""

    name = "eps"
    stable_at_zero_snr = False

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (z - sigma * output) / alpha


class X(_OneImage):
    """The output is x_hat itself."""

    name = "x"

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output


class XEps:
    """The output is x (first half of the channels) and eps: x_hat = sigma^2 x + alpha (z - sigma eps)."""

    name = "x_eps"
    stable_at_zero_snr = True

    def channels(self, image_channels: int) -> int:
        return 2 * image_channels

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        x, eps = output.chunk(2, dim=1)
        return sigma**2 * x + alpha * (z - sigma * eps)


class V(_OneImage):
    """The output is v = alpha eps - sigma x: x_hat = alpha z - sigma v."""

    name = "v"

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * z - sigma * output


def x_to_eps(x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """eps = (z - alpha x) / sigma."""
    return (z - alpha * x) / sigma


def x_to_v(x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha eps - sigma x, written as (alpha z - x) / sigma."""
    return (alpha * z - x) / sigma


BY_NAME: dict[str, type] = {p.name: p for p in (Eps, X, XEps, V)}


def broadcast(per_image: Tensor, images: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) in the images' dtype."""
    return torch.as_tensor(per_image, device=images.device, dtype=images.dtype).view(-1, 1, 1, 1)
