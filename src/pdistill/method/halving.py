"""Progressive distillation as in the paper (Salimans & Ho, 2022, Section 3, Algorithm 2)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdistill.denoiser import Denoiser
from pdistill.heads import first_heads
from pdistill.parameterization import broadcast
from pdistill.sampling import Condition
from pdistill.steps import Stage, stages
from pdistill.target import distillation_target
from pdistill.weighting import weighted_loss

if TYPE_CHECKING:
    from pdistill.training.settings import Steps


class Halving:
    """A student step learns to land where `teacher_steps` DDIM steps of its teacher do: two, in the paper's plans."""

    def stages(self, steps: "Steps", max_teacher_steps: int = 2) -> list[Stage]:
        """One student for each entry of the plan after the first. Raises UserError: see `steps.stages`."""
        return stages(steps.plan, steps.updates, steps.updates_last_two, max_teacher_steps)

    def begin(self, student: Denoiser, stage: Stage) -> Denoiser:
        """Of a student with heads, those whose times the next one has."""
        return first_heads(student, stage.num_steps)

    def losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        stage: Stage,
        weighting: Callable[[Tensor], Tensor],
        x: Tensor,
        condition: Condition,
    ) -> tuple[Tensor, Tensor]:
        """At t = i/N, i ~ U{1, ..., N}: the weighted squared error to `distillation_target` (B,), and logsnr (B,)."""
        i = torch.randint(1, stage.num_steps + 1, (len(x),), device=x.device)
        t = i / stage.num_steps
        logsnr = student.schedule(t)
        alpha, sigma = student.schedule.alpha_sigma(logsnr)
        z_t = broadcast(alpha, x) * x + broadcast(sigma, x) * torch.randn_like(x)
        with torch.inference_mode():
            x_target = distillation_target(teacher, z_t, t, stage.num_steps, condition, stage.teacher_steps)
        return weighted_loss(weighting, student(z_t, t, condition), x_target, logsnr), logsnr
