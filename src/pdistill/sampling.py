"""Samplers: functions of (denoiser, noise, number of steps)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pdistill import registry
from pdistill.parameterization import broadcast
from pdistill.randomness import normal
from pdistill.schedule import AlphaSigma, Schedule, logsnr_on_grid, variance_preserving

DDIM, STOCHASTIC = "ddim", "stochastic"  # samplers that students are taught
Variance = Literal["large", "small"] | float
Condition = Tensor | dict[str, Tensor] | None  # labels (B,), or tensors whose first dimension is B
Denoise = Callable[[Tensor, Tensor], Tensor]  # (z, t (B,)) -> x_hat, clipped and guided as was asked for
Callback = Callable[[int, Tensor, Tensor], None]  # (i, z, x_hat) at t = i / num_steps


def noised(x: Tensor, logsnr: Tensor, alpha_sigma: AlphaSigma = variance_preserving) -> Tensor:
    """z_t = alpha x + sigma eps, with noise from `randomness.normal`. Images (B, C, H, W), logsnr (B,)."""
    alpha, sigma = alpha_sigma(logsnr)
    return broadcast(alpha, x) * x + broadcast(sigma, x) * normal(x)


def ddim_step(
    z_t: Tensor, x_hat: Tensor, logsnr_t: Tensor, logsnr_s: Tensor, alpha_sigma: AlphaSigma = variance_preserving
) -> Tensor:
    """z_s = alpha_s x_hat + (sigma_s / sigma_t) (z_t - alpha_t x_hat) (paper, Section 2).

    Images (B, C, H, W), logsnr (B,). At logsnr_s = inf the result is x_hat.
    """
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    ratio = sigma_s / sigma_t
    return broadcast(ratio, z_t) * z_t + broadcast(alpha_s - ratio * alpha_t, z_t) * x_hat


@dataclass(frozen=True)
class Options:
    """What a sampler may ask for beside the denoiser, the noise and the number of steps."""

    step_noise: Callable[[int], Tensor] | None = None
    """Noise (B, C, H, W) for the step from t = (i + 1)/N to i/N."""
    variance: Variance = "large"
    """Of the ancestral sampler."""
    callback: Callback = field(default=lambda i, z, x_hat: None)
    """Is shown (i, z, x_hat) at every t = i/N, i = N, ..., 1."""

    def noise(self, i: int, z: Tensor) -> Tensor:
        """That of `step_noise`, or, without, as much as z from torch's global generator."""
        return torch.randn_like(z) if self.step_noise is None else self.step_noise(i)


def ddim(denoise: Denoise, schedule: Schedule, z: Tensor, num_steps: int, options: Options) -> Tensor:
    """The deterministic sampler of the paper: t = 1, 1 - 1/N, ..., 1/N; the last step returns x_hat."""
    x_hat = z
    for i, t, logsnr in _grid(schedule, z, num_steps):
        x_hat = denoise(z, t)
        options.callback(i, z, x_hat)
        if i > 1:
            z = ddim_step(z, x_hat, logsnr[i], logsnr[i - 1], schedule.alpha_sigma)
    return x_hat


def ancestral(denoise: Denoise, schedule: Schedule, z: Tensor, num_steps: int, options: Options) -> Tensor:
    """The stochastic sampler of the paper, with `options.variance` between its two bounds."""
    x_hat = z
    for i, t, logsnr in _grid(schedule, z, num_steps):
        x_hat = denoise(z, t)
        options.callback(i, z, x_hat)
        if i > 1:
            noise = options.noise(i - 1, z)
            mean, std = posterior(z, x_hat, schedule.alpha_sigma, (logsnr[i], logsnr[i - 1]), options.variance)
            z = mean + std * noise
    return x_hat


def stochastic(denoise: Denoise, schedule: Schedule, z: Tensor, num_steps: int, options: Options) -> Tensor:
    """The sampler of Meng et al., 2022 (2210.03142): from t = i/N one DDIM step to (i - 2)/N, then noise to (i - 1)/N.

    The last step returns x_hat. For students that were trained for steps of this length, and for teachers.
    """
    x_hat = z
    for i, t, logsnr in _grid(schedule, z, num_steps):
        x_hat = denoise(z, t)
        options.callback(i, z, x_hat)
        if i > 1:
            z = ddim_step(z, x_hat, logsnr[i], logsnr[i - 2], schedule.alpha_sigma)
            z = renoised(z, options.noise(i - 1, z), logsnr[i - 2], logsnr[i - 1], schedule.alpha_sigma)
    return x_hat


def renoised(
    z_s: Tensor, noise: Tensor, logsnr_s: Tensor, logsnr_m: Tensor, alpha_sigma: AlphaSigma = variance_preserving
) -> Tensor:
    """z_m ~ q(z_m | z_s) = N((alpha_m / alpha_s) z_s, (1 - SNR_m / SNR_s) sigma_m^2), for a noisier m, and unit noise.

    Images (B, C, H, W), logsnr (B,). The variance is sigma_m^2 - (alpha_m sigma_s / alpha_s)^2; s may be clean data.
    """
    alpha_s, _ = alpha_sigma(logsnr_s)
    alpha_m, sigma_m = alpha_sigma(logsnr_m)
    std = (-torch.expm1(logsnr_m - logsnr_s)).sqrt() * sigma_m
    return broadcast(alpha_m / alpha_s, z_s) * z_s + broadcast(std, z_s) * noise


def posterior(
    z_t: Tensor, x_hat: Tensor, alpha_sigma: AlphaSigma, logsnrs: tuple[Tensor, Tensor], variance: Variance = "large"
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z_s | z_t, x = x_hat), with a variance between its two bounds.

    With r = SNR_t / SNR_s: mean = (alpha_t sigma_s^2) / (alpha_s sigma_t^2) z_t + (1 - r) alpha_s x_hat;
    variance "large" = (1 - r) sigma_t^2, "small" = (1 - r) sigma_s^2, a fraction f in [0, 1] =
    large^f small^(1 - f). Paper, Section 2; `logsnrs` are those of t and s, the latter finite.
    """
    logsnr_t, logsnr_s = logsnrs
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    one_minus_r = -torch.expm1(logsnr_t - logsnr_s)
    mean = (
        broadcast(alpha_t * sigma_s**2 / (alpha_s * sigma_t**2), z_t) * z_t
        + broadcast(one_minus_r * alpha_s, z_t) * x_hat
    )
    large = float({"large": 1.0, "small": 0.0}.get(variance, variance))  # type: ignore[call-overload]
    return mean, broadcast(one_minus_r.sqrt() * sigma_t**large * sigma_s ** (1 - large), z_t)


def _grid(schedule: Schedule, z: Tensor, num_steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(i, t (B,), logsnr (N + 1, 1) at 0, ..., N) of every step; known beforehand, so that no step waits for them."""
    grid = torch.arange(num_steps + 1, device=z.device, dtype=torch.promote_types(z.dtype, torch.float32))
    logsnr = logsnr_on_grid(schedule, grid, num_steps)[:, None]
    for i in range(num_steps, 0, -1):
        yield i, (grid[i] / num_steps).expand(len(z)), logsnr


def samplers() -> list[str]:
    """What `sample` takes for `sampler`."""
    return registry.names("sampler")


def sampler_of(denoiser: Any, asked: str | None = None) -> str:
    """The sampler that was asked for; by default the denoiser's own: ddim, if it does not name another.

    Raises ValueError for one that is not known, and for one that a student was not taught: one of another sampler than
    ddim takes that alone, and one of ddim does not take stochastic. A teacher takes any.
    """
    own = getattr(denoiser, "sampler", DDIM)
    sampler = own if asked is None else asked
    if sampler not in samplers():
        raise ValueError(f"sampler must be one of {', '.join(samplers())}, not {sampler!r}")
    is_student = getattr(denoiser, "num_steps", None) is not None
    if is_student and sampler != own and (own != DDIM or sampler == STOCHASTIC):
        raise ValueError(
            f"this student of {denoiser.num_steps} steps was distilled for the sampler {own}, not {sampler}: its steps "
            f"have another length; leave the sampler out, or give {own}"
        )
    return sampler


def sample(
    denoiser: Any,
    noise: Tensor,
    num_steps: int,
    condition: Condition = None,
    sampler: str | None = None,
    clip: bool = True,
    *,
    guidance: float | None = None,
    variance: Variance = "large",
    step_noise: Sequence[Tensor] | Callable[[int], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Images (B, C, H, W) from unit noise of that shape in `num_steps` evaluations, t = 1, 1 - 1/N, ..., 1/N.

    `sampler` is a name that `samplers()` lists: ddim, ancestral, stochastic, one of diffusers' solvers, or a registered
    one; by default the denoiser's own, ddim if it does not name another. The last step returns x_hat. `clip` clamps
    every x_hat to [-1, 1], as the paper does; latents never are. The ancestral and the stochastic sampler take their
    noise in the step from t = (i + 1)/N to i/N, i = N-1, ..., 1, from `step_noise[i]` or `step_noise(i)`; by default it
    is drawn from torch's global generator. `callback(i, z, x_hat)` sees every step.

    `guidance` other than 1 takes x = x_none + guidance (x_condition - x_none), x_none being the prediction under the
    null condition, at two evaluations a step (classifier-free guidance, Ho & Salimans, 2022; the same in x as in eps).
    A denoiser that was taught guidance takes one. By default it is 1, or what lies nearest to it in the taught range.

    Raises ValueError for a step count below 1, a sampler that `sampler_of` refuses, a variance out of range, a
    class-conditional denoiser without labels, guidance of one that has no null condition, or outside of the range that
    was taught.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    sampler = sampler_of(denoiser, sampler)
    if variance not in ("large", "small") and not (isinstance(variance, int | float) and 0 <= variance <= 1):
        raise ValueError(f"variance must be 'large', 'small' or a fraction in [0, 1], not {variance!r}")
    num_classes = getattr(denoiser, "num_classes", None)
    if condition is None and num_classes is not None:
        raise ValueError(f"this denoiser is class-conditional: give it labels (B,) of 0 to {num_classes - 1}")
    if condition is None and getattr(denoiser, "codec", None) is not None:
        raise ValueError("this denoiser is conditioned on text: give it denoiser.codec.condition([<a prompt>, ...])")
    denoiser = denoiser.for_steps(num_steps) if hasattr(denoiser, "for_steps") else denoiser
    null: Condition = None
    taught = getattr(denoiser, "guidance", None)
    scale: float = getattr(denoiser, "default_guidance", 1.0) if guidance is None else guidance
    if taught is not None:
        if not taught[0] <= scale <= taught[1]:
            raise ValueError(f"guidance={scale:g} must be {_taught(*taught)}, which this denoiser was taught")
        condition = denoiser.told(condition, torch.full((len(noise),), scale, device=noise.device))
    elif scale != 1:
        if condition is None or not getattr(denoiser, "has_null_condition", False):
            raise ValueError(f"guidance={guidance} needs a class-conditional denoiser trained with label_dropout")
        null = denoiser.null_condition(condition)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        x_hat = denoiser(z, t, condition)
        if null is not None:
            x_hat = torch.lerp(denoiser(z, t, null), x_hat, scale)
        return x_hat.clamp(-1, 1) if clip and getattr(denoiser, "clips", True) else x_hat

    options: dict[str, Any] = {"variance": variance} | ({} if callback is None else {"callback": callback})
    if step_noise is not None:
        options["step_noise"] = step_noise if callable(step_noise) else step_noise.__getitem__
    with torch.inference_mode():
        z = noise * getattr(denoiser.schedule, "noise_scale", 1.0)
        images = registry.find("sampler", sampler)(denoise, denoiser.schedule, z, num_steps, Options(**options))
    return images.clone()  # an ordinary tensor, which autograd may use


def _taught(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"from {low:g} to {high:g}"
