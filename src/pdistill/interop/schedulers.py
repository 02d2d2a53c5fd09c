"""diffusers' own schedulers as samplers of a Denoiser, at equal network evaluations."""

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from pdistill.sampling import Denoise, Options
from pdistill.schedule import Schedule, betas

GRID = 1024  # of the discrete times that diffusers knows, at least; a multiple of the steps, which so fall on t = i/N
LEAST_LOGSNR = -20.0  # the paper's: from exactly zero SNR the solvers' first step is no number, or wild
# Of sigma / alpha (Karras et al., 2022); with the whole range of the paper's schedule, up to 22026, Heun's diverges.
HEUN_SIGMAS = {"sigma_min": 0.002, "sigma_max": 80.0}


@dataclass(frozen=True)
class Solver:
    """A sampler of diffusers' scheduler `kind`, made with `settings`: see `sampling.ddim` for the arguments.

    The solvers know variance preserving alone: they get z / sqrt(alpha^2 + sigma^2) and the betas of sigmoid(logsnr).
    """

    kind: Any
    settings: dict[str, Any]

    def __call__(self, denoise: Denoise, schedule: Schedule, z: Tensor, num_steps: int, options: Options) -> Tensor:
        """Images (B, C, H, W) from z_1; `denoise` is called `num_steps` times."""
        heun = self.kind is diffusers.HeunDiscreteScheduler  # takes two evaluations a step but for the last
        size = num_steps * -(-GRID // num_steps)
        grid = {
            "trained_betas": betas(lambda t: schedule(t).clamp(min=LEAST_LOGSNR), size),
            "timestep_spacing": "trailing",
        }
        scheduler = self.kind(size, prediction_type="sample", **grid, **self.settings)
        if heun:
            scheduler.register_to_config(**HEUN_SIGMAS)
        scheduler.set_timesteps((num_steps + 1) // 2 if heun else num_steps, device=z.device)
        alpha, sigma = schedule.alpha_sigma(schedule(torch.ones((), dtype=z.dtype, device=z.device)))
        z = z / (alpha**2 + sigma**2).sqrt() * scheduler.init_noise_sigma  # Heun's is z / alpha
        x_hat = z
        for k, timestep in enumerate(scheduler.timesteps):
            t = ((timestep + 1) / size).to(z.dtype)
            alpha, sigma = schedule.alpha_sigma(schedule(t))
            z_t = scheduler.scale_model_input(z, timestep) * (alpha**2 + sigma**2).sqrt()
            x_hat = denoise(z_t, t.expand(len(z)))
            options.callback(num_steps - k, z_t, x_hat)
            z = scheduler.step(x_hat, timestep, z).prev_sample
        return x_hat


dpmsolver_2m = Solver(diffusers.DPMSolverMultistepScheduler, {"solver_order": 2})
dpmsolver_3m = Solver(diffusers.DPMSolverMultistepScheduler, {"solver_order": 3})
unipc = Solver(diffusers.UniPCMultistepScheduler, {"solver_order": 2})
deis = Solver(diffusers.DEISMultistepScheduler, {"solver_order": 2})
heun = Solver(diffusers.HeunDiscreteScheduler, {"use_karras_sigmas": True})
