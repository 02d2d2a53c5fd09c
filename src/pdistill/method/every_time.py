"""What the stages between a teacher and its first student share: they are trained at every time, as a teacher is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pdistill.denoiser import Denoiser
from pdistill.randomness import uniform
from pdistill.sampling import Condition, noised
from pdistill.steps import TEACHERS, Stage
from pdistill.weighting import weighted_loss

if TYPE_CHECKING:
    from pdistill.training.settings import Steps


@dataclass(frozen=True, kw_only=True)
class EveryTime(ABC):
    """A method of one stage, whose result has no step count of its own. A subclass names it, and its target.

    Unless `clip` is false the target is clamped to [-1, 1], which is where samplers clamp it.
    """

    clip: bool = True
    called: ClassVar[str]

    def stages(self, steps: "Steps", max_teacher_steps: int = 1) -> list[Stage]:
        """One stage, as long as each of the last two, measured at the plan's first step count."""
        index = len(steps.plan) + TEACHERS.index(self.called) - 1  # after those of the plan
        return [Stage(index, steps.plan[0], 0, 1, steps.updates_last_two, called=self.called)]

    @abstractmethod
    def target(self, teacher: Denoiser, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The x_hat (B, C, H, W) that the student learns at z_t (B, C, H, W) and t (B,)."""

    def losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        stage: Stage,
        weighting: Callable[[Tensor], Tensor],
        x: Tensor,
        condition: Condition,
    ) -> tuple[Tensor, Tensor]:
        """At t ~ U(0, 1]: the weighted squared error to the target (B,), and logsnr (B,)."""
        t = 1 - uniform(x)  # never 0
        logsnr = student.schedule(t)
        z_t = noised(x, logsnr, student.schedule.alpha_sigma)
        with torch.inference_mode():
            x_target = self.target(teacher, z_t, t, condition)
            x_target = x_target.clamp(-1, 1) if self.clip else x_target
        return weighted_loss(weighting, student(z_t, t, condition), x_target, logsnr), logsnr
