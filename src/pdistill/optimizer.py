"""Optimizers, and the schedules of their learning rates.

An optimizer is a `callable(parameters, settings: Optimization) -> torch.optim.Optimizer`. Its state goes into
checkpoints and must be tensors and plain values. A schedule of learning rates is a function from the number of
updates done to a factor on `settings.learning_rate`; teachers and students bring theirs.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from pdistill.training.settings import Optimization

Factor = Callable[[int], float]  # updates done -> factor on the learning rate


def adamw(
    parameters: Iterable[nn.Parameter],
    settings: "Optimization",
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2019) with `settings.learning_rate` and `settings.weight_decay`, in fused kernels.

    `betas` are the decays of the averages of the gradient and of its square; `eps` keeps the division by the latter
    finite.
    """
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(betas[0], betas[1]),
        eps=eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def warm_up(updates: int) -> Factor:
    """Rises linearly to 1 over the first `updates`, and stays there; with 0 it is 1 from the start."""
    return lambda update: min(1.0, (update + 1) / updates) if updates else 1.0


def linear_to_zero(updates: int) -> Factor:
    """Falls linearly from 1 to 0 at `updates`, as in the paper's stages."""
    return lambda update: max(0.0, 1 - update / updates)


def constant_then_linear(updates: int, share: float) -> Factor:
    """1, then falls linearly to 0 over the last `share` of the updates: over all of them with 1, never with 0."""
    return lambda update: min(1.0, max(0.0, updates - update) / (share * updates)) if share else 1.0


def annealing(settings: "Optimization", updates: int) -> Factor:
    """The schedule of a stage of distillation, by its `learning_rate_schedule` and `final_decay`."""
    if settings.learning_rate_schedule == "constant":
        return constant_then_linear(updates, settings.final_decay)
    return linear_to_zero(updates)
