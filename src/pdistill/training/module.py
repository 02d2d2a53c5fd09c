"""What teacher training and distillation share: one LightningModule, one loss, one optimizer."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn

from pdistill import lora
from pdistill.denoiser import Denoiser
from pdistill.network import set_dropout
from pdistill.optimizer import Factor, adamw
from pdistill.randomness import Part, drawing, uniform
from pdistill.sampling import Condition
from pdistill.training import execution, nonfinite
from pdistill.training.settings import Execution, Optimization
from pdistill.weighting import truncated_snr, weighted_loss

__all__ = ["DenoisingModule", "Recipe", "weighted_loss"]


@dataclass(frozen=True)
class Recipe:
    """How weights are trained, whatever is trained."""

    settings: Optimization
    """Learning rate, decay, clipping, EMAs, dropout and a student's loss."""
    weighting: Callable[[Tensor], Tensor] = truncated_snr
    """Of the squared error in x, or a student's loss, as a function of logsnr."""
    optimizer: Callable[..., torch.optim.Optimizer] = adamw
    """`optimizer(parameters, settings)`; its state goes into checkpoints."""
    seed: int = 0
    """Of the noise, the times, the dropout and the hidden labels."""
    label_dropout: float = 0.0
    """Share of labels, or prompts, hidden from a network that knows what none means."""
    lora_rank: int | None = None
    """Of a student's adapters, which alone are trained; None: the whole network is."""
    execution: Execution = field(default_factory=Execution)
    """How the networks are run, which changes no name and no meaning."""
    skips: int | None = None
    """Updates in a row that are left out where their gradient is not finite; None: the first ends the training."""


class DenoisingModule(LightningModule):
    """Trains `denoiser` by `recipe` on the loss that a subclass defines, with gradient clipping and optional EMAs.

    A subclass gives `losses(batch) -> (losses (B,), logsnr (B,))`. A step's randomness is a function of
    (seed, stage, update): see `randomness.drawing`. A batch is a dict of `image` (B, C, H, W) in [-1, 1], `step`, the
    update's, `part` where an update takes several batches, and `label` (B,) or `condition`. `lr_factor` maps the
    updates done to a factor on the learning rate; `updates`, of the whole training, is what automatic decays of EMAs
    follow from.
    """

    def __init__(self, denoiser: Denoiser, recipe: Recipe, stage: int, lr_factor: Factor, updates: int) -> None:
        super().__init__()
        self.denoiser = lora.freeze_the_others(execution.arrange(denoiser, recipe.execution)).train()
        self.recipe = recipe
        self.stage_index = stage
        self.lr_factor = lr_factor
        self.updates = updates
        self.gradient_norm: Tensor | None = None
        self.bad: Tensor | None = None  # whether the update is left out; None: none ever is
        set_dropout(denoiser.network, recipe.settings.dropout)
        self.decays = recipe.settings.decays(updates)
        copies = [copy.deepcopy(denoiser).requires_grad_(False) for _ in self.decays]
        self.ema = copies[0] if copies else None
        self.further_emas = nn.ModuleList(copies[1:])
        self.chosen = 0  # of several, whose metrics are known at the end: see `fit`

    left_out: tuple[str, ...] = ()
    """How the names of those weights begin that are no part of checkpoints."""

    @abstractmethod
    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]: ...

    @property
    def result(self) -> Denoiser:
        """The denoiser that the training is for: the EMA where there is one; of several the first, then the chosen."""
        return self.emas[self.chosen] if self.emas else self.denoiser

    @property
    def emas(self) -> list[Denoiser]:
        """One for each of `decays`."""
        return [] if self.ema is None else [self.ema, *cast("Iterable[Denoiser]", self.further_emas)]

    def condition_of(self, batch: dict[str, Any]) -> Condition:
        """The batch's `condition` (labels, or a dict of tensors), else its `label` if the network takes one, else None.

        A share `label_dropout` of the labels is replaced by the null label (Ho & Salimans, 2022). A student that learns
        guidance is told of all, and of a guidance drawn uniformly from its range.
        """
        condition = batch.get("condition")
        if condition is None and self.denoiser.num_classes is not None:
            condition = batch["label"]
        if self.denoiser.guidance is not None:
            return self._guided(condition)
        if condition is None or not self.recipe.label_dropout:
            return condition
        null = self.denoiser.null_condition(condition)
        if isinstance(condition, dict) and isinstance(null, dict):
            nulls = {k: v for k, v in null.items() if v is not condition[k]}
            hidden = self._hides(next(iter(nulls.values())))
            return condition | {k: torch.where(_like(hidden, v), v, condition[k]) for k, v in nulls.items()}
        return torch.where(self._hides(condition), null, condition)  # type: ignore[arg-type]

    def _guided(self, condition: Condition) -> Condition:
        low, high = self.denoiser.guidance or (1.0, 1.0)
        if not self.denoiser.takes_guidance or condition is None:
            return condition
        tensor = next(iter(condition.values())) if isinstance(condition, dict) else condition
        return self.denoiser.told(condition, low + (high - low) * uniform(tensor))

    def _hides(self, condition: Tensor) -> Tensor:
        return uniform(condition) < self.recipe.label_dropout

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        key = self.recipe.seed, self.stage_index, int(batch["step"])
        accumulate = self.trainer.accumulate_grad_batches
        part = Part(self.global_rank * accumulate + batch.get("part", 0), self.trainer.world_size * accumulate)
        with drawing(self.device, key, part):
            losses, logsnr = self.losses(batch)
        return {"loss": losses.mean(), "losses": losses.detach(), "logsnr": logsnr.detach()}

    def on_train_start(self) -> None:
        execution.align(cast("torch.optim.Optimizer", self.optimizers(use_pl_optimizer=False)))

    def on_fit_start(self) -> None:
        weights = tuple(self.denoiser.parameters())  # listed once: walking the modules takes a millisecond
        pairs = zip(self.decays, self.emas, strict=True)
        self.averages = [partial(nonfinite.average, tuple(ema.parameters()), weights, d) for d, ema in pairs]

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        optimizer = self.recipe.optimizer(trained, self.recipe.settings)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norm to the recipe's `gradient_clip`, and keeps the norm for the log."""
        scaler = self.loss_scaler
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # a fused optimizer would do it after the clipping
        limit = self.recipe.settings.gradient_clip
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of several devices' shares
        self.gradient_norm = norm
        if self.recipe.skips is not None:
            bad = self.bad = norm.isfinite().logical_not()
            if scaler is None:  # which leaves such updates out itself
                nonfinite.leave_out(optimizer, bad)

    @property
    def loss_scaler(self) -> torch.amp.GradScaler | None:
        """Of float16 training, which skips updates whose gradient overflows; None for other precisions."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Not in on_train_batch_end: callbacks, and with them checkpoints, come before that hook of the module.
        super().optimizer_step(*args, **kwargs)
        for average in self.averages:
            average(self.bad)


def _like(hidden: Tensor, tensor: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), of as many dimensions as the tensor."""
    return hidden.view(-1, *[1] * (tensor.ndim - 1))
