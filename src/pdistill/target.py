"""What a student must predict, in closed form (paper, Section 3, Algorithm 2)."""

from typing import Any

import torch
from torch import Tensor

from pdistill.parameterization import broadcast
from pdistill.sampling import Condition, ddim_step
from pdistill.schedule import logsnr_on_grid


def distillation_target(
    teacher: Any,
    z_t: Tensor,
    t: Tensor,
    num_steps: int,
    condition: Condition = None,
    teacher_steps: int = 2,
) -> Tensor:
    """The x that a student step of size 1/num_steps must predict to land where `teacher_steps` of the teacher's do.

    z_t (B, C, H, W); t (B,), multiples of 1/num_steps above 0; `teacher(z, t, condition) -> x_hat` has a `schedule`.
    The teacher's DDIM steps compose to z_s = (sigma_s / sigma_t) z_t + sum_j c_j x_j, and a student step to (sigma_s /
    sigma_t) z_t + (sum_j c_j) x, so the target is sum_j c_j x_j / sum_j c_j: a convex combination of the teacher's
    predictions, from which z has cancelled. The sums obey c <- r c with r = sigma_{next} / sigma_{now}, then add
    alpha_{next} - r alpha_{now}; at s = 0, r = 0 and the target is the last prediction. Holds for every process.
    """
    schedule = teacher.schedule
    fine = num_steps * teacher_steps
    i = torch.round(t.double() * num_steps).long() * teacher_steps  # (B,) on the teacher's grid
    weighted_x, weight = torch.zeros_like(z_t), torch.zeros_like(i, dtype=torch.float64)
    z = z_t
    for j in range(teacher_steps):
        # The coefficients are differences of nearly equal numbers: (B,) of them, in float64.
        logsnr, next_logsnr = (logsnr_on_grid(schedule, (i - j - k).double(), fine) for k in (0, 1))
        x_hat = teacher(z, ((i - j).double() / fine).to(t.dtype), condition)
        alpha, sigma = schedule.alpha_sigma(logsnr)
        next_alpha, next_sigma = schedule.alpha_sigma(next_logsnr)
        r = next_sigma / sigma
        c = next_alpha - r * alpha
        weighted_x = broadcast(r, z_t) * weighted_x + broadcast(c, z_t) * x_hat
        weight = r * weight + c
        if j < teacher_steps - 1:
            z = ddim_step(z, x_hat, logsnr, next_logsnr, schedule.alpha_sigma)
    return weighted_x / broadcast(weight, z_t)
