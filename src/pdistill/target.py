"""What a student must predict, in closed form (paper, Section 3, Algorithm 2)."""

from typing import Any

import torch
from torch import Tensor

from pdistill.parameterization import broadcast
from pdistill.sampling import Condition, ddim_step
from pdistill.schedule import AlphaSigma, logsnr_on_grid


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


def consistency_target(
    reference: Any,
    z_t: Tensor,
    x_hat: Tensor,
    grid: tuple[Tensor, Tensor, int],
    condition: Condition = None,
) -> Tensor:
    """The x of a step from t to the end of its segment that goes through the teacher's next state.

    `grid` is (i, end, N): the step goes from t = i/N to end/N. The teacher, with its x_hat (B, C, H, W) at z_t, goes to
    (i - 1)/N; from there `reference(z, t, condition) -> x_hat`, which has a `schedule`, jumps to the end in one DDIM
    step. i, end (B,) are whole, 0 <= end < i.
    """
    i, end, num_steps = grid
    schedule = reference.schedule
    logsnrs = [logsnr_on_grid(schedule, k.double(), num_steps) for k in (i, i - 1, end)]
    z = ddim_step(z_t, x_hat, logsnrs[0], logsnrs[1], schedule.alpha_sigma)
    x_next = reference(z, ((i - 1).double() / num_steps).to(z_t.dtype), condition)
    return x_of_two_steps(x_hat, x_next, *logsnrs)


def x_of_two_steps(x_1: Tensor, x_2: Tensor, logsnr_t: Tensor, logsnr_m: Tensor, logsnr_s: Tensor) -> Tensor:
    """The x of the DDIM step t -> s that lands where t -> m with x_1 and then m -> s with x_2 do.

    This is (z_s - r z_t) / (alpha_s - r alpha_t), r = sigma_s / sigma_t, with z_t cancelled: w x_1 + (1 - w) x_2 with
    w = (q_m - q_t) / (q_s - q_t), q = alpha / sigma = exp(logsnr / 2). So it holds for every process. At m = s it is
    x_1; else at s = 0 it is x_2. Images (B, C, H, W), logsnr (B,), rising from t to s, in float64.
    """
    gap_m, gap_s = (torch.expm1((logsnr_t - logsnr) / 2) for logsnr in (logsnr_m, logsnr_s))
    w = torch.exp((logsnr_m - logsnr_s) / 2) * gap_m / gap_s
    at_end = broadcast((logsnr_m == logsnr_s).to(w.dtype), x_1) > 0
    return torch.where(at_end, x_1, torch.lerp(x_2, x_1, broadcast(w, x_1)))


def with_variance(
    x_hat: Tensor, z_t: Tensor, logsnrs: tuple[Tensor, Tensor], variance: Tensor, alpha_sigma: AlphaSigma
) -> Tensor:
    """The x whose DDIM step t -> s is aDDIM's (Heek et al., 2024, 2403.06807).

    x_hat is a mean, and lacks the variance v (B,) of the pixels about it. aDDIM lengthens the noise to
    F = sqrt(sigma_s^2 + d v g^2 / |eps_hat|^2), g = alpha_s - (sigma_s / sigma_t) alpha_t, so that
    x = x_hat + (F - sigma_s) eps_hat / g. At s = 0 it is x_hat. Images (B, C, H, W) of d values; `logsnrs` of t and s.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (alpha_sigma(logsnr) for logsnr in logsnrs)
    eps_hat = (z_t - broadcast(alpha_t, z_t) * x_hat) / broadcast(sigma_t, z_t)
    g = alpha_s - sigma_s / sigma_t * alpha_t
    added = g * variance / eps_hat.double().square().mean((1, 2, 3)).clamp(min=1e-12)
    share = added / ((sigma_s**2 + g * added).sqrt() + sigma_s)  # (F - sigma_s) / g, without a difference
    return x_hat + broadcast(torch.where(sigma_s > 0, share, 0), z_t) * eps_hat


def analytic_variance(x_hat: Tensor, logsnr: Tensor) -> Tensor:
    """0.1 / (2 + SNR), of images in [-1, 1] (2403.06807); (B,)."""
    return 0.1 / (2 + logsnr.exp())
