"""What a student must predict, in closed form (paper, Section 3, Algorithm 2), and teachers of a better step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pdistill.errors import UserError
from pdistill.parameterization import broadcast
from pdistill.sampling import Condition, ddim_step
from pdistill.schedule import AlphaSigma, logsnr_on_grid

Variance = Callable[[Tensor, Tensor], Tensor]  # (x_hat (B, C, H, W), logsnr (B,)) -> E (x - x_hat)^2 per pixel, (B,)


def distillation_target(
    teacher: Any,
    z_t: Tensor,
    t: Tensor,
    num_steps: int,
    condition: Condition = None,
    teacher_steps: int = 2,
    *,
    order: int = 1,
    variance: Variance | None = None,
) -> Tensor:
    """The x that a student step of size 1/num_steps must predict to land where `teacher_steps` of the teacher's do.

    z_t (B, C, H, W); t (B,), multiples of 1/num_steps above 0; `teacher(z, t, condition) -> x_hat` has a `schedule`.
    The teacher's DDIM steps compose to z_s = (sigma_s / sigma_t) z_t + sum_j c_j x_j, and a student step to (sigma_s /
    sigma_t) z_t + (sum_j c_j) x, so the target is sum_j c_j x_j / sum_j c_j: a convex combination of the teacher's
    predictions, from which z has cancelled. The sums obey c <- r c with r = sigma_{next} / sigma_{now}, then add
    alpha_{next} - r alpha_{now}; at s = 0, r = 0 and the target is the last prediction. Holds for every process.

    Two kinds of steps are DDIM's with another x_j in the place of the teacher's, so that all this stays true of them:
    `order=2` is DPM-Solver++(2M), which begins anew at every z_t (`extrapolated`), and `variance` makes aDDIM
    (`with_variance`). Neither costs an evaluation. Of order 2 the target is no convex combination of the teacher's
    predictions: the weights still add up to 1, and those of earlier predictions may be negative. Both are for teachers
    that were trained in continuous time: a student's DDIM steps are what it was taught.
    """
    route = ddim_route(t, num_steps, teacher_steps)
    return x_along(route, teacher, z_t, condition, order=order, variance=variance)


@dataclass(frozen=True)
class Route:
    """Where a teacher's steps lead: through the times points / `grid`, whole numbers (B,) that never rise.

    Where two neighbours are equal, the example has arrived, and the step changes nothing. The teacher sees times of
    `dtype`, none below 1/`grid`.
    """

    points: Sequence[Tensor]
    grid: int
    dtype: torch.dtype


def ddim_route(t: Tensor, num_steps: int, teacher_steps: int) -> Route:
    """From t (B,), multiples of 1/num_steps above 0, to t - 1/num_steps in `teacher_steps` equal steps."""
    i = torch.round(t.double() * num_steps).long() * teacher_steps  # (B,) on the teacher's grid
    return Route([i - j for j in range(teacher_steps + 1)], num_steps * teacher_steps, t.dtype)


def stochastic_route(t: Tensor, num_steps: int, teacher_steps: int, continuous: bool) -> Route:
    """From t = i/N to max(i - 2, 0)/N, a step of a student of N steps for the stochastic sampler (2210.03142).

    A teacher of `continuous` time takes k = `teacher_steps` equal steps. A student of k N steps takes those that it was
    taught, of 2/(k N), and of 1/(k N) where there is no more to go: k of them, and half as many, rounded up, at i = 1.
    """
    i = torch.round(t.double() * num_steps).long()
    end, stride = (i - 2).clamp(min=0) * teacher_steps, i.clamp(max=2) if continuous else 2
    steps = teacher_steps if continuous or num_steps > 1 else (teacher_steps + 1) // 2
    points = [torch.maximum(i * teacher_steps - j * stride, end) for j in range(steps + 1)]
    return Route(points, num_steps * teacher_steps, t.dtype)


def x_along(
    route: Route,
    teacher: Any,
    z_t: Tensor,
    condition: Condition = None,
    *,
    order: int = 1,
    variance: Variance | None = None,
) -> Tensor:
    """The x of the one step from z_t, at the route's start, to its end that lands where the teacher's steps lead.

    `distillation_target` says how. `variance` is for routes on which no example arrives before the last step.
    """
    schedule = teacher.schedule
    weighted_x, weight = torch.zeros_like(z_t), torch.zeros_like(route.points[0], dtype=torch.float64)
    z = z_t
    before: tuple[Tensor, Tensor] | None = None  # prediction and log-SNR of the step before
    # The coefficients are differences of nearly equal numbers: (B,) of them, in float64.
    logsnrs = [logsnr_on_grid(schedule, k.double(), route.grid) for k in route.points]
    scales = [schedule.alpha_sigma(logsnr) for logsnr in logsnrs]
    for k, (i, next_i) in enumerate(pairwise(route.points)):
        logsnr, next_logsnr = logsnrs[k : k + 2]
        predicted = x_hat = teacher(z, (i.clamp(min=1).double() / route.grid).to(route.dtype), condition)
        if order == 2 and before is not None:
            x_hat = extrapolated(predicted, before[0], (before[1], logsnr, next_logsnr))
        if variance is not None:
            v = variance(predicted, logsnr)
            x_hat = with_variance(predicted, z, (logsnr, next_logsnr), v, schedule.alpha_sigma)
        before = predicted, logsnr
        (alpha, sigma), (next_alpha, next_sigma) = scales[k : k + 2]
        r = torch.where(next_i < i, next_sigma / sigma, 1.0)
        c = next_alpha - r * alpha
        weighted_x = broadcast(r, z_t) * weighted_x + broadcast(c, z_t) * x_hat
        weight = r * weight + c
        if k + 2 < len(route.points):  # nobody looks at the last state
            z = broadcast(r, z_t) * z + broadcast(c, z_t) * x_hat  # `ddim_step`
    return weighted_x / broadcast(weight, z_t)


def extrapolated(x_hat: Tensor, x_before: Tensor, logsnrs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """x_hat + h / (2 h_before) (x_hat - x_before): the x of a second-order step, DPM-Solver++(2M) of Lu et al., 2022.

    `logsnrs` (B,) are those of the step before, of now and of the step's end; h is half the log-SNR that a step gains.
    Where either step is infinitely long, on from zero SNR or on to clean data, the result is x_hat.
    """
    start, now, end = logsnrs
    ratio = ((end - now) / (2 * (now - start))).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return x_hat + broadcast(ratio, x_hat) * (x_hat - x_before)


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
    """The x whose DDIM step from z_t is aDDIM's (Heek et al., 2024, 2403.06807), which keeps the noise's norm right.

    x_hat (B, C, H, W) is a mean, and DDIM's z_s = alpha_s x_hat + sigma_s eps_hat lacks the variance v (B,) per pixel
    that x has about it. aDDIM takes F = sqrt(sigma_s^2 + g^2 v d / |eps_hat|^2) for sigma_s, where
    g = alpha_s - (sigma_s / sigma_t) alpha_t and d is the number of pixels; that is the DDIM step of
    x_hat + (F - sigma_s) / g eps_hat. `logsnrs` (B,) are those of t and s. At s = 0 the result is x_hat.
    """
    (alpha, sigma), (next_alpha, next_sigma) = (alpha_sigma(logsnr) for logsnr in logsnrs)
    g = next_alpha - next_sigma / sigma * alpha
    eps_hat = (z_t - broadcast(alpha, z_t) * x_hat) / broadcast(sigma, z_t)
    added = g * variance.double() / eps_hat.double().square().mean(dim=(1, 2, 3)).clamp(min=1e-12)
    # (F - sigma_s) / g without the difference of nearly equal numbers
    share = added / ((next_sigma**2 + g * added).sqrt() + next_sigma)
    return x_hat + broadcast(torch.where(next_sigma > 0, share, 0), z_t) * eps_hat


def analytic_variance(x_hat: Tensor, logsnr: Tensor) -> Tensor:
    """0.1 / (2 + SNR), (B,): a constant of images in [-1, 1] (2403.06807)."""
    return 0.1 / (2 + logsnr.exp())


def measured_variance(x: Tensor) -> Variance:
    """0.75 times the mean squared error to x (B, C, H, W), the images that the noise was added to (2403.06807)."""
    return lambda x_hat, logsnr: 0.75 * (x_hat - x).square().mean(dim=(1, 2, 3))


def variance_of(addim: bool | str, x: Tensor) -> Variance | None:
    """What a method's key `addim` asks for, at images x (B, C, H, W): true is `analytic_variance`, false None."""
    if not addim:
        return None
    return measured_variance(x) if addim == "measured" else analytic_variance


def check_teacher_steps(teacher_order: object, addim: object) -> None:
    """Raises UserError unless these values of a method's keys are known, and not two kinds of steps at once."""
    if isinstance(teacher_order, bool) or teacher_order not in (1, 2):
        raise UserError(f"method.teacher_order={teacher_order} must be 1, for DDIM, or 2, for DPM-Solver++(2M)")
    if not isinstance(addim, bool) and addim != "measured":
        raise UserError(f"method.addim={addim} must be false, true or measured")
    if addim and teacher_order == 2:
        raise UserError(
            f"method.teacher_order=2 and method.addim={addim} correct the same error of the teacher's steps: give one"
        )
