"""What makes a teacher of another output predict x or v, before it is halved (paper, Section 4)."""

from dataclasses import dataclass

from torch import Tensor

from pdistill.denoiser import Denoiser
from pdistill.method.every_time import EveryTime
from pdistill.sampling import Condition
from pdistill.steps import CONVERTED


@dataclass(frozen=True, kw_only=True)
class Conversion(EveryTime):
    """The student learns its teacher's own x_hat, at every time: `distill.py parameterization=v` of an eps teacher.

    At the noisy end x_hat = (z - sigma eps) / alpha multiplies the network's error by sigma / alpha (157 where linear
    betas end), so that the target is better clamped.
    """

    called = CONVERTED

    def target(self, teacher: Denoiser, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The teacher's x_hat."""
        return teacher(z_t, t, condition)
