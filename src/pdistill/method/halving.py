"""Progressive distillation as in the paper (Salimans & Ho, 2022, Section 3, Algorithm 2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdistill.checks import flag
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.heads import first_heads
from pdistill.randomness import integers
from pdistill.sampling import DDIM, STOCHASTIC, Condition, noised
from pdistill.steps import Stage, stages
from pdistill.target import check_teacher_steps, ddim_route, stochastic_route, variance_of, x_along
from pdistill.weighting import weighted_loss

if TYPE_CHECKING:
    from pdistill.training.settings import Steps


@dataclass(frozen=True)
class Halving:
    """A student step learns to land where `teacher_steps` DDIM steps of its teacher do: two, in the paper's plans.

    A teacher that was trained in continuous time may take better steps: of second order, `teacher_order=2`, or aDDIM's,
    with `addim`, whose variance is a formula's (true) or measured on the images ("measured"): see `pdistill.target`.
    Stages that a student teaches keep to DDIM, which is what it was taught. Raises UserError for both at once.

    With `stochastic`, the students are for that sampler: a step goes from i/N to (i - 2)/N, as far as there is time.
    """

    teacher_order: int = 1
    addim: bool | str = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_teacher_steps(self.teacher_order, self.addim)
        flag("method.stochastic", self.stochastic)

    @property
    def sampler(self) -> str:
        """Of its students."""
        return STOCHASTIC if self.stochastic else DDIM

    def check(self, teacher: Denoiser) -> None:
        """Raises UserError for better steps of a first teacher that was taught DDIM's: no stage would take them."""
        if teacher.num_steps is not None and (self.teacher_order == 2 or self.addim):
            raise UserError(
                f"method.teacher_order=2 and method.addim are for a teacher that knows every time, and this one was "
                f"distilled for {teacher.num_steps} steps: leave them out, or give the teacher it was distilled from"
            )

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
        """At t = i/N, i ~ U{1, ..., N}: the weighted squared error to the target (B,), and logsnr (B,)."""
        i = integers(1, stage.num_steps + 1, x)
        t = i / stage.num_steps
        logsnr, continuous = student.schedule(t), teacher.num_steps is None
        z_t = noised(x, logsnr, student.schedule.alpha_sigma)
        counts = stage.num_steps, stage.teacher_steps
        route = stochastic_route(t, *counts, continuous) if self.stochastic else ddim_route(t, *counts)
        with torch.no_grad():  # torch.compile tells inference tensors apart
            order, variance = (self.teacher_order, variance_of(self.addim, x)) if continuous else (1, None)
            x_target = x_along(route, teacher, z_t, condition, order=order, variance=variance)
        return weighted_loss(weighting, student(z_t, t, condition), x_target, logsnr), logsnr
