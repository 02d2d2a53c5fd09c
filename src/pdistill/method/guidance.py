"""What teaches a student its teacher's classifier-free guidance (Meng et al., 2023, 2210.03142, Algorithm 1)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdistill import network as networks
from pdistill.denoiser import Denoiser
from pdistill.method.every_time import EveryTime
from pdistill.parameterization import broadcast
from pdistill.sampling import Condition
from pdistill.steps import GUIDED, Stage


@dataclass(frozen=True)
class Guidance(EveryTime):
    """The student learns x_none + g (x_condition - x_none) at every time, for g ~ U[low, high], or one value.

    It then needs one evaluation where its teacher needs two. Of a range, g is an input of its network, which changes
    nothing before the first update.
    """

    low: float
    high: float
    called = GUIDED

    def begin(self, student: Denoiser, stage: Stage) -> Denoiser:
        """It takes guidance, and heeds it not. Raises UserError for a network that has no place for a range."""
        student.guidance = self.low, self.high
        if student.takes_guidance:
            student.network = networks.with_guidance(student.network)
        return student

    def target(self, teacher: Denoiser, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The guided x_hat, of the guidance (B,) in the condition, or of the one value."""
        assert condition is not None  # the commands refuse a teacher without a null condition
        given = dict(condition) if isinstance(condition, dict) else {"label": condition}
        g = given.pop("guidance", torch.full_like(t, self.low))
        null: Any = teacher.null_condition(given)
        both = {name: torch.cat([null[name], value]) for name, value in given.items()}  # one pass of both
        x_none, x_given = teacher(torch.cat([z_t, z_t]), torch.cat([t, t]), both).chunk(2)
        return torch.lerp(x_none, x_given, broadcast(g, z_t))
