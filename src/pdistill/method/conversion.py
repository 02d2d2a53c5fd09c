"""What makes a teacher of another output predict x or v, before it is halved (paper, Section 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdistill.denoiser import Denoiser
from pdistill.sampling import Condition, noised
from pdistill.steps import CONVERTED, Stage
from pdistill.weighting import weighted_loss

if TYPE_CHECKING:
    from pdistill.training.settings import Steps


@dataclass(frozen=True)
class Conversion:
    """The student learns its teacher's own x_hat, at every time: `distill.py parameterization=v` of an eps teacher.

    At the noisy end x_hat = (z - sigma eps) / alpha multiplies the network's error by sigma / alpha (157 where linear
    betas end). Unless `clip` is false the target is clamped to [-1, 1], which is where the teacher's samplers clamp it.
    """

    clip: bool = True

    def stages(self, steps: "Steps", max_teacher_steps: int = 1) -> list[Stage]:
        """One stage at every time, as long as each of the last two, measured at the plan's first step count."""
        return [Stage(len(steps.plan), steps.plan[0], 0, 1, steps.updates_last_two, called=CONVERTED)]

    def losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        stage: Stage,
        weighting: Callable[[Tensor], Tensor],
        x: Tensor,
        condition: Condition,
    ) -> tuple[Tensor, Tensor]:
        """At t ~ U(0, 1]: the weighted squared error to the teacher's x_hat (B,), and logsnr (B,)."""
        t = 1 - torch.rand(len(x), device=x.device)  # never 0
        logsnr = student.schedule(t)
        z_t = noised(x, logsnr, student.schedule.alpha_sigma)
        with torch.inference_mode():
            x_target = teacher(z_t, t, condition)
            x_target = x_target.clamp(-1, 1) if self.clip else x_target
        return weighted_loss(weighting, student(z_t, t, condition), x_target, logsnr), logsnr
