"""One student for several step counts, from one stage (PDD, 2607.26004), in terms of x_hat."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.heads import Mean, grown, table
from pdistill.parameterization import broadcast
from pdistill.randomness import uniform
from pdistill.sampling import Condition, ddim_step, noised
from pdistill.schedule import logsnr_on_grid
from pdistill.steps import Stage
from pdistill.weighting import weighted_loss

if TYPE_CHECKING:
    from pdistill.training.settings import Steps


class ParallelDecoding:
    """Head k of the student predicts the teacher's step over interval k, from the state at the start of its block.

    The teacher takes one step, from the state that the block's earlier heads lead to. `last` is the share of updates
    that train a block's last head, the others being uniform among its heads; `mean` is what they are averaged in
    (`heads.Heads`).
    """

    def __init__(self, mean: Mean = "x", last: float = 0.5) -> None:
        if mean not in ("x", "velocity"):
            raise UserError(f"method.mean={mean} must be x or velocity")
        if not isinstance(last, int | float) or not 0 <= last <= 1:
            raise UserError(f"method.last={last} must be a share, 0 to 1")
        self.mean: Mean = mean
        self.last = last

    def stages(self, steps: "Steps", max_teacher_steps: int = 1) -> list[Stage]:
        """One stage: plan[0] is the grid, the others the student's step counts; as many updates as halving's stages.

        Raises UserError for a plan whose first entry another one does not divide.
        """
        grid, *counts = steps.plan
        if counts != sorted(set(counts), reverse=True) or any(grid % n or n >= grid for n in counts):
            raise UserError(
                f"steps.plan={list(steps.plan)}: with method=parallel_decoding the first entry is the grid, which each "
                f"of the others must divide, in falling order, e.g. steps.plan=[32,8,4,2,1]"
            )
        short = max(0, len(counts) - 2)
        updates = steps.updates * short + steps.updates_last_two * (len(counts) - short)
        return [Stage(1, counts[0], 0, grid // counts[0], updates, counts=tuple(counts))]

    def begin(self, student: Denoiser, stage: Stage) -> Denoiser:
        """Its last layer repeated for every interval: at first each step is the teacher's one DDIM step."""
        return grown(student, stage.grid, stage.counts, self.mean)

    def losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        stage: Stage,
        weighting: Callable[[Tensor], Tensor],
        x: Tensor,
        condition: Condition,
    ) -> tuple[Tensor, Tensor]:
        """Of one head of a block of a student of one step count, all drawn: (B,), and its interval's logsnr (B,)."""
        heads: Any = student.parameterization
        grid, (start, k) = stage.grid, self._draw(stage, x)
        t, logsnr = self._time(student, start, grid)
        t_k, logsnr_k = self._time(student, k, grid)
        alpha, sigma = (broadcast(a, x) for a in student.schedule.alpha_sigma(logsnr))
        z = noised(x, logsnr, student.schedule.alpha_sigma)
        output = student.output(z, t, condition)
        x_k = heads.inner.to_x(heads.mix(output, heads.weights(k, k + 1)), z, alpha, sigma)
        with torch.inference_mode():
            until = heads.inner.to_x(heads.mix(output, heads.weights(start, k)), z, alpha, sigma)
            z_k = ddim_step(z, until, logsnr, logsnr_k, student.schedule.alpha_sigma)
            x_target = teacher(z_k, t_k, condition)
        if self.mean == "velocity":  # the head's velocity, taken as that at z_k
            alpha_k, sigma_k = (broadcast(a, x) for a in student.schedule.alpha_sigma(logsnr_k))
            change = sigma_k / sigma * (z - (alpha + sigma) * x_k)
            x_k = (z_k - change) / (alpha_k + sigma_k)
        return weighted_loss(weighting, x_k, x_target, logsnr_k), logsnr_k

    def _draw(self, stage: Stage, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first head of a block and one of its heads, (B,) each: first a step count, then one of its blocks."""
        draw = uniform(x, rows=(4,), dtype=torch.float64)
        counts = table(torch.int64, stage.counts, x.device)
        count = counts[(draw[0] * len(stage.counts)).long()]
        length = stage.grid // count
        start = (draw[1] * count).long() * length
        return start, start + torch.where(draw[2] < self.last, length - 1, (draw[3] * length).long())

    def _time(self, student: Denoiser, head: Tensor, grid: int) -> tuple[Tensor, Tensor]:
        """t and logsnr where the intervals of heads (B,) start."""
        i = (grid - head).double()
        return (i / grid).float(), logsnr_on_grid(student.schedule, i, grid)
