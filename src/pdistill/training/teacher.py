"""Training of the teacher in continuous time."""

import torch
from torch import Tensor

from pdistill.parameterization import broadcast
from pdistill.schedule import alpha_sigma
from pdistill.training.module import DenoisingModule, weighted_loss


class TeacherModule(DenoisingModule):
    """t ~ U[0, 1], z_t = alpha_t x + sigma_t eps, and the weighted squared error of x_hat(z_t) in x.

    The learning rate rises linearly over `warmup_updates` and then stays. Other arguments: DenoisingModule.
    """

    def __init__(self, *args, warmup_updates: int = 0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.warmup_updates = warmup_updates

    def losses(self, batch: dict) -> tuple[Tensor, Tensor]:
        x = batch["image"]
        t = torch.rand(len(x), device=x.device)
        logsnr = self.denoiser.schedule(t)
        alpha, sigma = alpha_sigma(logsnr)
        z_t = broadcast(alpha, x) * x + broadcast(sigma, x) * torch.randn_like(x)
        x_hat = self.denoiser(z_t, t, self.label_of(batch))
        return weighted_loss(self.weighting, x_hat, x, logsnr), logsnr

    def lr_factor(self, update: int) -> float:
        return min(1.0, (update + 1) / self.warmup_updates) if self.warmup_updates else 1.0
