"""What the network's output means: the one place for every conversion between eps, x and v.

Each class turns the network's output into x_hat, the denoised image, under any process z = alpha x + sigma eps (paper,
Section 4, without its alpha^2 + sigma^2 = 1). `alpha` and `sigma` must broadcast against the images `z` (B, C, H, W).
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Parameterization(Protocol):
    """Every parameterization has these; `stable_at_zero_snr` is False if x_hat divides by alpha.

    One whose network wants another input than z also has `scale_input(z, alpha, sigma) -> (B, C, H, W)`.
    """

    name: str

    @property
    def stable_at_zero_snr(self) -> bool: ...

    def channels(self, image_channels: int) -> int: ...

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...


class OneImage:
    """The output has as many channels as the image, and is stable at zero SNR: a base of own parameterizations."""

    stable_at_zero_snr: bool = True

    def channels(self, image_channels: int) -> int:
        """Channels of the network's output."""
        return image_channels


class Eps(OneImage):
    """The output is eps: x_hat = (z - sigma eps) / alpha, which no distillation survives as alpha -> 0."""

    name = "eps"
    stable_at_zero_snr = False

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_hat = (z - sigma eps) / alpha."""
        return (z - sigma * output) / alpha


class X(OneImage):
    """The output is x_hat itself."""

    name = "x"

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_hat = output."""
        return output


class XEps:
    """The output is x (first half of the channels) and eps.

    x_hat = (sigma^2 x + alpha (z - sigma eps)) / (alpha^2 + sigma^2): each counts where it is the better known.
    """

    name = "x_eps"
    stable_at_zero_snr = True

    def channels(self, image_channels: int) -> int:
        """Two images."""
        return 2 * image_channels

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_hat = (sigma^2 x + alpha (z - sigma eps)) / (alpha^2 + sigma^2)."""
        x, eps = output.chunk(2, dim=1)
        return (sigma**2 * x + alpha * (z - sigma * eps)) / (alpha**2 + sigma**2)


class V(OneImage):
    """The output is v = alpha eps - sigma x: x_hat = (alpha z - sigma v) / (alpha^2 + sigma^2)."""

    name = "v"

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_hat = (alpha z - sigma v) / (alpha^2 + sigma^2)."""
        return (alpha * z - sigma * output) / (alpha**2 + sigma**2)


class Flow(OneImage):
    """The output is the velocity u = eps - x of flow matching: x_hat = (z - sigma u) / (alpha + sigma)."""

    name = "flow"

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_hat = (z - sigma u) / (alpha + sigma)."""
        return (z - sigma * output) / (alpha + sigma)


@dataclass(frozen=True)
class Edm(OneImage):
    """EDM's preconditioning (Karras et al., 2022, Table 1), for data of deviation `sigma_data`, in any process.

    With D = alpha^2 sigma_data^2 + sigma^2 the network sees z / sqrt(D), and with its output F
    x_hat = (alpha sigma_data^2 / D) z + (sigma sigma_data / sqrt(D)) F. At sigma_data = 1 and alpha^2 + sigma^2 = 1, F
    = -v.
    """

    sigma_data: float = 0.5
    name: ClassVar[str] = "edm"

    def scale_input(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """c_in z = z / sqrt(D)."""
        return z * self._d(alpha, sigma).rsqrt()

    def to_x(self, output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_hat = c_skip z + c_out F."""
        d = self._d(alpha, sigma)
        return alpha * self.sigma_data**2 / d * z + sigma * self.sigma_data * d.rsqrt() * output

    def _d(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha**2 * self.sigma_data**2 + sigma**2


def x_to_eps(x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """eps = (z - alpha x) / sigma."""
    return (z - alpha * x) / sigma


def x_to_v(x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha eps - sigma x, written as (alpha z - (alpha^2 + sigma^2) x) / sigma."""
    return (alpha * z - (alpha**2 + sigma**2) * x) / sigma


def broadcast(per_image: Tensor, images: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) in the images' dtype."""
    return torch.as_tensor(per_image, device=images.device, dtype=images.dtype).view(-1, *[1] * (images.ndim - 1))
