"""Multistep consistency models (Heek et al., 2024, 2403.06807)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdistill.checks import flag, number, whole
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.method import refuse_max_teacher_steps
from pdistill.randomness import integers
from pdistill.sampling import Condition, noised
from pdistill.schedule import logsnr_on_grid
from pdistill.steps import Stage, stages
from pdistill.target import analytic_variance, consistency_target, with_variance
from pdistill.weighting import weighted_loss

if TYPE_CHECKING:
    from pdistill.training.settings import Steps


class MultistepConsistency:
    """From every t of a segment, one student step learns to reach the segment's end, taught by the teacher itself.

    The teacher does one step of a grid; from there the student itself, without gradient, jumps to the end. The grid
    grows from `teacher_steps_from` to `teacher_steps_to` steps, exponentially over the share `annealed` of the updates.
    `addim` lengthens the noise of the teacher's step: see `target.with_variance`.
    """

    def __init__(
        self, teacher_steps_from: int = 64, teacher_steps_to: int = 1280, annealed: float = 0.5, addim: bool = False
    ) -> None:
        whole("method.teacher_steps_from", teacher_steps_from, 1)
        whole("method.teacher_steps_to", teacher_steps_to, teacher_steps_from)
        number("method.annealed", annealed)
        if annealed > 1:
            raise UserError(f"method.annealed={annealed} must be a share of the updates, at most 1")
        flag("method.addim", addim)
        self.range = teacher_steps_from, teacher_steps_to
        self.annealed = annealed
        self.addim = addim
        self.teacher_steps: float = teacher_steps_from

    def stages(self, steps: "Steps", max_teacher_steps: int = 2) -> list[Stage]:
        """One student for each entry of the plan after the first, all taught by the teacher. Raises UserError."""
        refuse_max_teacher_steps("multistep_consistency", max_teacher_steps)
        plan = stages(steps.plan, steps.updates, steps.updates_last_two, max_teacher_steps=steps.plan[0])
        if self.range[1] < 2 * plan[0].num_steps:
            raise UserError(
                f"method.teacher_steps_to={self.range[1]} gives a student of {plan[0].num_steps} steps nothing to "
                f"learn: use at least {2 * plan[0].num_steps}, or fewer steps in steps.plan={list(steps.plan)}"
            )
        return plan

    def check(self, teacher: Denoiser) -> None:
        """Raises UserError for a teacher that knows its own grid alone."""
        if teacher.num_steps is not None:
            raise UserError(
                f"method=multistep_consistency asks its teacher at every time, and this one was distilled for "
                f"{teacher.num_steps} steps: give the teacher that it was distilled from, or use method=halving"
            )

    def before_update(self, student: Denoiser, done: int, updates: int) -> None:
        """The grid of this update."""
        low, high = self.range
        progress = min(1.0, done / (self.annealed * updates)) if self.annealed else 1.0
        self.teacher_steps = low * (high / low) ** progress

    def segment(self, num_steps: int) -> int:
        """Steps of the grid in each of the student's: whole, so that the top of every segment is trained."""
        return max(1, round(self.teacher_steps / num_steps))

    def losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        stage: Stage,
        weighting: Callable[[Tensor], Tensor],
        x: Tensor,
        condition: Condition,
    ) -> tuple[Tensor, Tensor]:
        """At a uniform t of the grid: the weighted squared error to `consistency_target` (B,), and logsnr (B,)."""
        schedule, n = student.schedule, self.segment(stage.num_steps)
        fine = n * stage.num_steps
        end = n * integers(0, stage.num_steps, x)
        i = end + integers(1, n + 1, x)
        t = (i.double() / fine).to(x.dtype)
        logsnr, logsnr_next = (logsnr_on_grid(schedule, k.double(), fine) for k in (i, i - 1))
        z_t = noised(x, logsnr, schedule.alpha_sigma)
        with torch.no_grad():  # not inference_mode: the student itself is asked, and FSDP2 keeps its weights for later
            x_hat = teacher(z_t, t, condition)
            if self.addim:
                v = analytic_variance(x_hat, logsnr)
                x_hat = with_variance(x_hat, z_t, (logsnr, logsnr_next), v, schedule.alpha_sigma)
            x_target = consistency_target(student, z_t, x_hat, (i, end, fine), condition)
        logsnr = logsnr.to(x.dtype)
        return weighted_loss(weighting, student(z_t, t, condition), x_target, logsnr), logsnr
