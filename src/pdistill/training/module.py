"""What teacher training and distillation share: one LightningModule, one loss, one optimizer."""

import copy
from abc import abstractmethod
from collections.abc import Callable

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pdistill.denoiser import Denoiser
from pdistill.randomness import seed_global_generator


def weighted_loss(weighting: Callable[[Tensor], Tensor], x_hat: Tensor, x: Tensor, logsnr: Tensor) -> Tensor:
    """w(logsnr) times the mean squared error in x, per example: (B, C, H, W) twice and (B,) -> (B,)."""
    return weighting(logsnr) * (x_hat - x).square().mean(dim=(1, 2, 3))


class DenoisingModule(LightningModule):
    """Trains `denoiser` on the loss that a subclass defines; AdamW, gradient clipping, optional EMA.

    A subclass gives `losses(batch) -> (per-example losses (B,), logsnr (B,))` and `lr_factor(update)`. All of
    a step's randomness comes from torch's global generator, seeded by (seed, stage, step, rank), dropout
    included. A batch is a dict of `image` (B, C, H, W) in [-1, 1], `step` and, with classes, `label` (B,).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weighting: Callable[[Tensor], Tensor],
        learning_rate: float,
        weight_decay: float = 0.0,
        gradient_clip: float | None = 1.0,
        ema_decay: float | None = None,
        seed: int = 0,
        stage: int = 0,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.weighting = weighting
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.gradient_clip = gradient_clip
        self.seed = seed
        self.stage = stage
        self.label_dropout = label_dropout
        self.gradient_norm: Tensor | None = None
        self.ema = None
        if ema_decay is not None:
            self.ema = copy.deepcopy(denoiser).requires_grad_(False)
            self.average = get_ema_multi_avg_fn(ema_decay)

    @abstractmethod
    def losses(self, batch: dict) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def lr_factor(self, update: int) -> float: ...

    @property
    def result(self) -> Denoiser:
        """The denoiser that the training is for: the EMA where there is one."""
        return self.denoiser if self.ema is None else self.ema

    def label_of(self, batch: dict) -> Tensor | None:
        """(B,), some of them replaced by the null label: classifier-free guidance (Ho & Salimans, 2022)."""
        if self.denoiser.num_classes is None:
            return None
        label = batch["label"]
        if not self.label_dropout:
            return label
        return torch.where(
            torch.rand(label.shape, device=label.device) < self.label_dropout, self.denoiser.null_label, label
        )

    def training_step(self, batch: dict, batch_idx: int) -> dict:
        seed_global_generator(self.device, self.seed, self.stage, int(batch["step"]), self.global_rank)
        losses, logsnr = self.losses(batch)
        return {"loss": losses.mean(), "losses": losses.detach(), "logsnr": logsnr}

    def on_fit_start(self) -> None:
        if self.ema is not None:  # listed once: walking the modules takes a millisecond
            self.averaged = list(self.ema.parameters()), list(self.denoiser.parameters())

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        limit = float("inf") if self.gradient_clip is None else self.gradient_clip
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit)

    def optimizer_step(self, *args, **kwargs) -> None:
        # Not in on_train_batch_end: callbacks, and with them checkpoints, come before that hook of the module.
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.average(*self.averaged, None)
