"""TRACT: few phases of consistency on groups of steps (Berthelot et al., 2023, 2303.04248)."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pdistill.checks import flag, number
from pdistill.denoiser import Denoiser
from pdistill.method import refuse_max_teacher_steps
from pdistill.randomness import integers
from pdistill.sampling import Condition, noised
from pdistill.schedule import logsnr_on_grid
from pdistill.steps import Stage, stages
from pdistill.target import consistency_target
from pdistill.weighting import weighted_loss

if TYPE_CHECKING:
    from pdistill.training.settings import Steps


class Tract(nn.Module):
    """From every t of a group of the teacher's steps, one student step learns to reach the group's end.

    The teacher does one step; from there the self-teacher, a moving average of the student, jumps to the end: two
    evaluations for a group of any size. `self_teacher_decay` is the average's decay, with its bias to the start
    corrected; `clip` clamps the teacher's x_hat to [-1, 1].
    """

    def __init__(self, self_teacher_decay: float = 0.5, clip: bool = True) -> None:
        super().__init__()
        number("method.self_teacher_decay", self_teacher_decay, 1)
        flag("method.clip", clip)
        self.decay = self_teacher_decay
        self.clip = clip
        self.self_teacher: Denoiser | None = None

    def stages(self, steps: "Steps", max_teacher_steps: int = 2) -> list[Stage]:
        """One phase for each entry of the plan after the first, taught by the phase before. Raises UserError."""
        refuse_max_teacher_steps("tract", max_teacher_steps)
        return stages(steps.plan, steps.updates, steps.updates_last_two, max_teacher_steps=1)

    @torch.no_grad()
    def before_update(self, student: Denoiser, done: int, updates: int) -> None:
        """The self-teacher becomes sum_j decay^(done - j) theta_j / sum_j decay^(done - j), j = 0, ..., done."""
        if self.self_teacher is None:
            self.self_teacher = copy.deepcopy(student).requires_grad_(False).eval()
        share = (1 - self.decay) / (1 - self.decay ** (done + 1))
        mine, its = (tuple(denoiser.parameters()) for denoiser in (self.self_teacher, student))
        torch._foreach_lerp_(mine, its, share)
        for kept, value in zip(self.self_teacher.buffers(), student.buffers(), strict=True):
            kept.copy_(value)

    def losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        stage: Stage,
        weighting: Callable[[Tensor], Tensor],
        x: Tensor,
        condition: Condition,
    ) -> tuple[Tensor, Tensor]:
        """At a uniform t of the teacher's grid: the weighted squared error to `consistency_target` (B,), and logsnr."""
        group, fine = stage.teacher_steps, stage.num_steps * stage.teacher_steps
        end = group * integers(0, stage.num_steps, x)
        i = end + integers(1, group + 1, x)
        t = (i.double() / fine).to(x.dtype)
        logsnr = logsnr_on_grid(student.schedule, i.double(), fine).to(x.dtype)
        z_t = noised(x, logsnr, student.schedule.alpha_sigma)
        with torch.inference_mode():
            x_hat = teacher(z_t, t, condition)
            x_hat = x_hat.clamp(-1, 1) if self.clip else x_hat
            x_target = consistency_target(self.self_teacher, z_t, x_hat, (i, end, fine), condition)
        return weighted_loss(weighting, student(z_t, t, condition), x_target, logsnr), logsnr
