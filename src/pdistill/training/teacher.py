"""Training of the teacher in continuous time."""

from typing import Any

from torch import Tensor

from pdistill.denoiser import Denoiser
from pdistill.optimizer import warm_up
from pdistill.randomness import uniform
from pdistill.sampling import noised
from pdistill.training.module import DenoisingModule, Recipe, weighted_loss
from pdistill.training.settings import Training

SMALLEST_TIME = 2**-24  # the spacing of torch.rand in float32: its largest number is 1 - 2^-24


class TeacherModule(DenoisingModule):
    """t by the schedule's density, z_t = alpha_t x + sigma_t eps, and the weighted squared error of x_hat(z_t) in x.

    t = schedule.training_time(u) with u ~ U[0, 1]: uniform unless the schedule says otherwise. It stays off both
    ends, where a schedule's log-SNR may be infinite. The learning rate rises over `recipe.settings.warmup_updates`
    and then stays. Without a recipe the settings' own defaults are taken.
    """

    def __init__(self, denoiser: Denoiser, recipe: Recipe | None = None) -> None:
        recipe = recipe or Recipe(Training())
        warmup, updates = (getattr(recipe.settings, key, 0) for key in ("warmup_updates", "updates"))
        super().__init__(denoiser, recipe, stage=0, lr_factor=warm_up(warmup), updates=updates)

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(B,) losses and (B,) logsnr of a batch."""
        x, schedule = batch["image"], self.denoiser.schedule
        u = uniform(x)
        t = schedule.training_time(u) if hasattr(schedule, "training_time") else u
        t = t.clamp(SMALLEST_TIME, 1 - SMALLEST_TIME)
        logsnr = schedule(t)
        z_t = noised(x, logsnr, schedule.alpha_sigma)
        x_hat = self.denoiser(z_t, t, self.condition_of(batch))
        return weighted_loss(self.recipe.weighting, x_hat, x, logsnr), logsnr
