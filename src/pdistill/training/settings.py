"""Settings of training and distillation, checked when they are made; no torch, so that composing stays quick."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdistill.checks import number, whole
from pdistill.errors import UserError


@dataclass
class Optimization:
    """What training a teacher and distilling a student configure alike."""

    batch_size: int = 64
    """Images of an update, over all devices and accumulated batches."""
    learning_rate: float = 1e-3
    """Of the optimizer, before its schedule."""
    weight_decay: float = 0.0
    """Of the optimizer, decoupled (AdamW)."""
    gradient_clip: float | None = 1.0
    """Largest norm of an update's gradient; null for none."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights, which is then the result; null for none."""
    dropout: float = 0.0
    """Probability of every dropout layer of the network."""

    section = "training"

    def __post_init__(self) -> None:
        whole(f"{self.section}.batch_size", self.batch_size, 1)
        number(f"{self.section}.learning_rate", self.learning_rate)
        number(f"{self.section}.weight_decay", self.weight_decay)
        number(f"{self.section}.gradient_clip", self.gradient_clip, null=True)
        number(f"{self.section}.ema_decay", self.ema_decay, 1, null=True)
        number(f"{self.section}.dropout", self.dropout, 1)


@dataclass
class Training(Optimization):
    """Of the teacher."""

    updates: int = 2000
    """Updates of the weights."""
    warmup_updates: int = 100
    """Updates over which the learning rate rises linearly; afterwards it is constant."""
    ema_decay: float | None = 0.995

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("training.updates", self.updates, 1)
        whole("training.warmup_updates", self.warmup_updates, 0)


@dataclass
class Distillation(Optimization):
    """Of every stage; the updates per stage are in the steps group."""

    learning_rate: float = 3e-4
    """Annealed linearly to 0 within each stage."""
    max_teacher_steps: int = 2
    """4 or 8: a stage learns from an earlier one where its steps are at most so many to one."""

    section = "distillation"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("distillation.max_teacher_steps", self.max_teacher_steps, 1)


@dataclass
class Conversion(Optimization):
    """Of the stage that makes a teacher predict x or v, where it predicts eps."""

    learning_rate: float = 3e-4
    """Annealed linearly to 0."""
    updates: int | None = None
    """Updates of the weights; null: as many as each of the last two stages."""
    clip: bool = True
    """Clamp the teacher's predictions, which are the targets, to [-1, 1]."""

    section = "conversion"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.updates is not None:
            whole("conversion.updates", self.updates, 1)


@dataclass
class Steps:
    """The plan of step counts."""

    plan: list[int] = field(default_factory=lambda: [32, 16, 8, 4, 2, 1])
    """From the step count at which the teacher is sampled to the last student's, each dividing the one before."""
    updates: int = 300
    """Of each stage."""
    updates_last_two: int = 600
    """Of the last two stages, as in the paper."""

    def __post_init__(self) -> None:
        counts = list(self.plan) if isinstance(self.plan, Sequence) and not isinstance(self.plan, str) else []
        if len(counts) < 2 or not all(type(n) is int and n >= 1 for n in counts):
            raise UserError(
                f"steps.plan={self.plan} must list at least two whole step counts, e.g. steps.plan=[32,16,8]"
            )
        whole("steps.updates", self.updates, 1)
        whole("steps.updates_last_two", self.updates_last_two, 1)
