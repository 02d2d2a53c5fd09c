"""What teaches a student its teacher's classifier-free guidance (Meng et al., 2023, 2210.03142, Algorithm 1)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdistill import network as networks
from pdistill.denoiser import Denoiser
from pdistill.parameterization import broadcast
from pdistill.sampling import Condition, noised
from pdistill.steps import GUIDED, Stage
from pdistill.weighting import weighted_loss

if TYPE_CHECKING:
    from pdistill.training.settings import Steps


@dataclass(frozen=True)
class Guidance:
    """The student learns x_none + g (x_condition - x_none) at every time, for g ~ U[low, high], or one value.

    It then needs one evaluation where its teacher needs two. Of a range, g is an input of its network, which changes
    nothing before the first update. Unless `clip` is false the target is clamped to [-1, 1], as samplers clamp it.
    """

    low: float
    high: float
    clip: bool = True

    def stages(self, steps: "Steps", max_teacher_steps: int = 1) -> list[Stage]:
        """One stage at every time, as long as each of the last two, measured at the plan's first step count."""
        return [Stage(len(steps.plan) + 1, steps.plan[0], 0, 1, steps.updates_last_two, called=GUIDED)]

    def begin(self, student: Denoiser, stage: Stage) -> Denoiser:
        """It takes guidance, and heeds it not. Raises UserError for a network that has no place for a range."""
        student.guidance = self.low, self.high
        if student.takes_guidance:
            student.network = networks.with_guidance(student.network)
        return student

    def losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        stage: Stage,
        weighting: Callable[[Tensor], Tensor],
        x: Tensor,
        condition: Condition,
    ) -> tuple[Tensor, Tensor]:
        """At t ~ U(0, 1]: the weighted squared error to the guided x_hat (B,), and logsnr (B,)."""
        t = 1 - torch.rand(len(x), device=x.device)  # never 0
        logsnr = student.schedule(t)
        z_t = noised(x, logsnr, student.schedule.alpha_sigma)
        assert condition is not None  # the commands refuse a teacher without a null condition
        given = dict(condition) if isinstance(condition, dict) else {"label": condition}
        g = given.pop("guidance", torch.full_like(t, self.low))
        with torch.inference_mode():
            x_none = teacher(z_t, t, teacher.null_condition(given))
            x_target = torch.lerp(x_none, teacher(z_t, t, given), broadcast(g, x))
            x_target = x_target.clamp(-1, 1) if self.clip else x_target
        return weighted_loss(weighting, student(z_t, t, condition), x_target, logsnr), logsnr
