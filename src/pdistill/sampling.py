"""Samplers: functions of (denoiser, noise, number of steps)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pdistill.parameterization import broadcast
from pdistill.schedule import alpha_sigma, logsnr_on_grid

Variance = Literal["large", "small"] | float


def ddim_step(z_t: Tensor, x_hat: Tensor, logsnr_t: Tensor, logsnr_s: Tensor) -> Tensor:
    """z_s = alpha_s x_hat + (sigma_s / sigma_t) (z_t - alpha_t x_hat) (paper, Section 2).

    Images (B, C, H, W), logsnr (B,). At logsnr_s = inf the result is x_hat.
    """
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    ratio = sigma_s / sigma_t
    return broadcast(ratio, z_t) * z_t + broadcast(alpha_s - ratio * alpha_t, z_t) * x_hat


def ancestral_step(
    z_t: Tensor, x_hat: Tensor, logsnr_t: Tensor, logsnr_s: Tensor, noise: Tensor, variance: Variance = "large"
) -> Tensor:
    """A draw from the posterior q(z_s | z_t, x = x_hat), with a variance between its two bounds.

    With r = SNR_t / SNR_s: mean = (alpha_t sigma_s^2) / (alpha_s sigma_t^2) z_t + (1 - r) alpha_s x_hat;
    variance "large" = (1 - r) sigma_t^2, "small" = (1 - r) sigma_s^2, a fraction f in [0, 1] =
    large^f small^(1 - f). Paper, Section 2; needs logsnr_s < inf.
    """
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    one_minus_r = -torch.expm1(logsnr_t - logsnr_s)
    mean = (
        broadcast(alpha_t * sigma_s**2 / (alpha_s * sigma_t**2), z_t) * z_t
        + broadcast(one_minus_r * alpha_s, z_t) * x_hat
    )
    large = {"large": 1.0, "small": 0.0}.get(variance, variance)
    std = one_minus_r.sqrt() * sigma_t**large * sigma_s ** (1 - large)
    return mean + broadcast(std, z_t) * noise


def samplers() -> list[str]:
    """What `sample` takes for `sampler`."""
    from pdistill.baselines import SCHEDULERS  # diffusers: half a second

    return ["ddim", "ancestral", *SCHEDULERS]


def sample(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    num_steps: int,
    label: Tensor | None = None,
    sampler: str = "ddim",
    clip: bool = True,
    guidance: float = 1.0,
    variance: Variance = "large",
    step_noise: Sequence[Tensor] | Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Images (B, C, H, W) from noise of that shape in `num_steps` evaluations, t = 1, 1 - 1/N, ..., 1/N.

    `sampler` is ddim, ancestral or one of diffusers' by its name in `baselines.SCHEDULERS`. The last step returns
    x_hat. `clip` clamps every x_hat to [-1, 1], as the paper does. The ancestral sampler takes its noise in the step
    from t = (i + 1)/N to i/N, i = N-1, ..., 1, from `step_noise[i]` or `step_noise(i)`; by default it is drawn from
    torch's global generator.

    `guidance` other than 1 takes x = x_none + guidance (x_label - x_none), x_none being the prediction without a
    label, at two evaluations a step (classifier-free guidance, Ho & Salimans, 2022; the same in x as in eps).

    Raises ValueError for a step count below 1, an unknown sampler, a variance out of range, a class-conditional
    denoiser without labels, or guidance of one that has no null label.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    if sampler not in samplers():
        raise ValueError(f"sampler must be one of {', '.join(samplers())}, not {sampler!r}")
    if variance not in ("large", "small") and not (isinstance(variance, int | float) and 0 <= variance <= 1):
        raise ValueError(f"variance must be 'large', 'small' or a fraction in [0, 1], not {variance!r}")
    num_classes = getattr(denoiser, "num_classes", None)
    if label is None and num_classes is not None:
        raise ValueError(f"this denoiser is class-conditional: give it labels (B,) of 0 to {num_classes - 1}")
    null = None
    if guidance != 1:
        if getattr(denoiser, "null_label", None) is None:
            raise ValueError(f"guidance={guidance} needs a class-conditional denoiser trained with label_dropout")
        null = torch.full((len(noise),), denoiser.null_label, device=noise.device)
    if step_noise is None:
        step_noise = lambda i: torch.randn_like(noise)  # noqa: E731
    elif not callable(step_noise):
        step_noise = step_noise.__getitem__

    def x_hat_of(z: Tensor, t: Tensor) -> Tensor:
        x_hat = denoiser(z, t, label)
        if null is not None:
            x_hat = torch.lerp(denoiser(z, t, null), x_hat, guidance)
        return x_hat.clamp(-1, 1) if clip else x_hat

    with torch.inference_mode():
        if sampler not in ("ddim", "ancestral"):
            from pdistill.baselines import integrate

            return integrate(x_hat_of, denoiser.schedule, noise, sampler, num_steps).clone()
        # The grid is known beforehand: (N + 1, 1), so that a row broadcasts over the batch.
        grid = torch.arange(num_steps + 1, device=noise.device, dtype=torch.promote_types(noise.dtype, torch.float32))
        logsnr = logsnr_on_grid(denoiser.schedule, grid, num_steps)[:, None]
        z = noise
        for i in range(num_steps, 0, -1):
            x_hat = x_hat_of(z, (grid[i] / num_steps).expand(len(z)))
            if i == 1:
                break
            if sampler == "ddim":
                z = ddim_step(z, x_hat, logsnr[i], logsnr[i - 1])
            else:
                z = ancestral_step(z, x_hat, logsnr[i], logsnr[i - 1], step_noise(i - 1), variance)
    return x_hat.clone()  # an ordinary tensor, which autograd may use
