"""diffusers' own schedulers as samplers of a Denoiser, at equal network evaluations."""

from collections.abc import Callable

import diffusers
from torch import Tensor

from pdistill.schedule import CosineSchedule, betas

GRID = 1024  # of the discrete times that diffusers knows; steps fall on t = 1, 1 - 1/N, ... rounded to it
# Of sigma / alpha (Karras et al., 2022); with the whole range of the paper's schedule, up to 22026, Heun's diverges.
HEUN_SIGMAS = {"sigma_min": 0.002, "sigma_max": 80.0}
SCHEDULERS = {
    "dpmsolver++2m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpmsolver++3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 2}),
    "deis": (diffusers.DEISMultistepScheduler, {"solver_order": 2}),
    "heun": (diffusers.HeunDiscreteScheduler, {"use_karras_sigmas": True}),
}


def integrate(
    x_hat_of: Callable[[Tensor, Tensor], Tensor], schedule: CosineSchedule, noise: Tensor, name: str, num_steps: int
) -> Tensor:
    """Images (B, C, H, W) from noise; `x_hat_of(z, t)`, t (B,), is called `num_steps` times.

    Heun's method takes two evaluations a step but for the last: with an even `num_steps` it is called once less.
    """
    kind, options = SCHEDULERS[name]
    grid = {"trained_betas": betas(schedule, GRID), "timestep_spacing": "trailing"}
    scheduler = kind(GRID, prediction_type="sample", **grid, **options)
    if name == "heun":
        scheduler.register_to_config(**HEUN_SIGMAS)
    scheduler.set_timesteps((num_steps + 1) // 2 if name == "heun" else num_steps, device=noise.device)
    z = noise * scheduler.init_noise_sigma  # Heun's is z / alpha
    for timestep in scheduler.timesteps:
        x_hat = x_hat_of(scheduler.scale_model_input(z, timestep), ((timestep + 1) / GRID).expand(len(z)).to(z.dtype))
        z = scheduler.step(x_hat, timestep, z).prev_sample
    return x_hat
