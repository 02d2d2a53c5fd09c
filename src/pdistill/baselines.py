"""diffusers' own schedulers as samplers of a Denoiser, one network evaluation for each step.

Heun's is not among them: it works in sigma / alpha, which begins at 22026 in the paper's schedule, and with so long a
first step it diverges.
"""

from collections.abc import Callable

import diffusers
from torch import Tensor

from pdistill.schedule import CosineSchedule, betas

GRID = 1024  # of the discrete times that diffusers knows; steps fall on t = 1, 1 - 1/N, ... rounded to it
SCHEDULERS = {
    "dpmsolver++2m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpmsolver++3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 2}),
    "deis": (diffusers.DEISMultistepScheduler, {"solver_order": 2}),
}


def integrate(
    x_hat_of: Callable[[Tensor, Tensor], Tensor], schedule: CosineSchedule, noise: Tensor, name: str, num_steps: int
) -> Tensor:
    """Images (B, C, H, W) from noise; `x_hat_of(z, t)`, t (B,), is called `num_steps` times."""
    kind, options = SCHEDULERS[name]
    grid = {"trained_betas": betas(schedule, GRID), "timestep_spacing": "trailing"}
    scheduler = kind(GRID, prediction_type="sample", **grid, **options)
    scheduler.set_timesteps(num_steps, device=noise.device)
    z = noise
    for timestep in scheduler.timesteps:
        x_hat = x_hat_of(z, ((timestep + 1) / GRID).expand(len(z)).to(z.dtype))
        z = scheduler.step(x_hat, timestep, z).prev_sample
    return x_hat
