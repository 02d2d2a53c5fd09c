"""One stage of progressive distillation (paper, Section 3, Algorithm 2)."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from pdistill.denoiser import Denoiser
from pdistill.network import set_dropout
from pdistill.parameterization import broadcast
from pdistill.sampling import ddim_step
from pdistill.schedule import alpha_sigma, logsnr_on_grid
from pdistill.training.module import DenoisingModule, weighted_loss


def distillation_target(
    teacher: Callable[..., Tensor],
    z_t: Tensor,
    t: Tensor,
    num_steps: int,
    label: Tensor | None = None,
    teacher_steps: int = 2,
) -> Tensor:
    """The x that a student step of size 1/num_steps must predict to land where `teacher_steps` of the teacher's do.

    z_t (B, C, H, W); t (B,), multiples of 1/num_steps above 0. The teacher's DDIM steps compose to
    z_s = (sigma_s / sigma_t) z_t + sum_j c_j x_j, and a student step to (sigma_s / sigma_t) z_t + (sum_j c_j) x, so
    the target is sum_j c_j x_j / sum_j c_j: a convex combination of the teacher's predictions, from which z
    has cancelled. The sums obey c <- r c with r = sigma_{next} / sigma_{now}, then add alpha_{next} - r alpha_{now};
    at s = 0, r = 0 and the target is the last prediction.
    """
    fine = num_steps * teacher_steps
    i = torch.round(t.double() * num_steps).long() * teacher_steps  # (B,) on the teacher's grid
    weighted_x, weight = torch.zeros_like(z_t), torch.zeros_like(i, dtype=torch.float64)
    z = z_t
    for j in range(teacher_steps):
        # The coefficients are differences of nearly equal numbers: (B,) of them, in float64.
        logsnr, next_logsnr = (logsnr_on_grid(teacher.schedule, (i - j - k).double(), fine) for k in (0, 1))
        x_hat = teacher(z, ((i - j).double() / fine).to(t.dtype), label)
        alpha, sigma = alpha_sigma(logsnr)
        next_alpha, next_sigma = alpha_sigma(next_logsnr)
        r = next_sigma / sigma
        c = next_alpha - r * alpha
        weighted_x = broadcast(r, z_t) * weighted_x + broadcast(c, z_t) * x_hat
        weight = r * weight + c
        if j < teacher_steps - 1:
            z = ddim_step(z, x_hat, logsnr, next_logsnr)
    return weighted_x / broadcast(weight, z_t)


class DistillationModule(DenoisingModule):
    """A student that learns to do in one step what the frozen `teacher` does in `teacher_steps`.

    The student starts as a copy of `start`, by default of the teacher, with its own `dropout`; the learning rate
    anneals linearly from `learning_rate` to 0 over `updates`. The teacher is in eval mode, is run under inference
    mode and is not in the checkpoint. Other arguments: DenoisingModule.
    """

    strict_loading = False  # the checkpoint leaves the teacher out

    def __init__(
        self,
        teacher: Denoiser,
        num_steps: int,
        *args,
        updates: int,
        teacher_steps: int = 2,
        dropout: float = 0.0,
        start: Denoiser | None = None,
        **kwargs,
    ) -> None:
        start = start or teacher
        student = copy.deepcopy(start).requires_grad_(True).train()
        student.num_steps = num_steps
        student.lineage = [*start.lineage, num_steps]
        set_dropout(student, dropout)
        super().__init__(student, *args, **kwargs)
        self.teacher = teacher.requires_grad_(False).eval()
        self.num_steps = num_steps
        self.teacher_steps = teacher_steps
        self.updates = updates

    @property
    def student(self) -> Denoiser:
        return self.denoiser

    def train(self, mode: bool = True) -> "DistillationModule":
        super().train(mode)
        self.teacher.eval()
        return self

    def losses(self, batch: dict) -> tuple[Tensor, Tensor]:
        x = batch["image"]
        i = torch.randint(1, self.num_steps + 1, (len(x),), device=x.device)
        t = i / self.num_steps
        logsnr = self.student.schedule(t)
        alpha, sigma = alpha_sigma(logsnr)
        z_t = broadcast(alpha, x) * x + broadcast(sigma, x) * torch.randn_like(x)
        label = self.label_of(batch)
        with torch.inference_mode():
            x_target = distillation_target(self.teacher, z_t, t, self.num_steps, label, self.teacher_steps)
        return weighted_loss(self.weighting, self.student(z_t, t, label), x_target, logsnr), logsnr

    def lr_factor(self, update: int) -> float:
        return max(0.0, 1 - update / self.updates)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("teacher.")}
