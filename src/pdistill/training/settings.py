"""Settings of training and distillation, checked when they are made; no torch, so that composing stays quick."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pdistill.checks import number, whole
from pdistill.errors import UserError

SCHEDULES = ("linear", "constant")  # of the learning rate in a stage: `pdistill.optimizer.annealing`
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")  # of torch.compile
MATMUL_PRECISIONS = ("default", "highest", "high", "medium")
LOSSES = ("squared", "l2", "pseudo_huber")  # `pdistill.weighting.DISTANCES`


@dataclass(kw_only=True)
class Execution:
    """How networks are run while they are trained. It decides the speed, and the rounding, and nothing else."""

    compile: bool = False
    """Compile student and teacher with torch.compile: a minute or more before each stage, then faster updates."""
    compile_mode: str = "default"
    """default, reduce-overhead (CUDA graphs), max-autotune-no-cudagraphs or max-autotune."""
    channels_last: bool = False
    """Keep weights, and with them activations, with their channels last."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, the same losses."""
    matmul_precision: str = "default"
    """Of float32 on GPUs: highest, high (TF32) or medium; default: torch's, TF32 in convolutions alone."""

    def __post_init__(self) -> None:
        _one_of("compile_mode", self.compile_mode, COMPILE_MODES)
        _one_of("matmul_precision", self.matmul_precision, MATMUL_PRECISIONS)
        if self.compile_mode != "default" and not self.compile:
            raise UserError(f"compile_mode={self.compile_mode} is of compiled networks: add compile=true")


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
    ema_decay: Any = None
    """Decay of the exponential moving average of the weights, which is then the result; auto: 0.001^(1/updates); null
    for none."""
    dropout: float = 0.0
    """Probability of every dropout layer of the network."""

    section = "training"
    learning_rate_schedule = "linear"  # these four are settings of students, below
    final_decay = 0.3
    loss = "squared"
    huber_c = None

    def __post_init__(self) -> None:
        whole(f"{self.section}.batch_size", self.batch_size, 1)
        number(f"{self.section}.learning_rate", self.learning_rate)
        number(f"{self.section}.weight_decay", self.weight_decay)
        number(f"{self.section}.gradient_clip", self.gradient_clip, null=True)
        if self.ema_decay is not None:
            _check_decay(f"{self.section}.ema_decay", self.ema_decay)
        number(f"{self.section}.dropout", self.dropout, 1)

    def decays(self, updates: int) -> list[float]:
        """Of the EMAs of a training of so many updates; none: an empty list.

        The rule, decay^updates = 0.001, is that of Berthelot et al., 2023 (TRACT, 2303.04248): of the weights that the
        training started from, a thousandth is left.
        """
        return [0.001 ** (1 / updates) if decay == "auto" else decay for decay in self._given_decays()]

    def _given_decays(self) -> list[Any]:
        return [] if self.ema_decay is None else [self.ema_decay]


@dataclass
class Training(Optimization):
    """Of the teacher."""

    updates: int = 2000
    """Updates of the weights."""
    warmup_updates: int = 100
    """Updates over which the learning rate rises linearly; afterwards it is constant."""
    ema_decay: Any = 0.995

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("training.updates", self.updates, 1)
        whole("training.warmup_updates", self.warmup_updates, 0)


@dataclass
class Distillation(Optimization):
    """Of every stage; the updates per stage are in the steps group."""

    learning_rate: float = 3e-4
    """Annealed to 0 within each stage."""
    learning_rate_schedule: str = "linear"
    """linear: falls from the first update to the last, as in the paper; constant: falls at the end alone."""
    final_decay: float = 0.3
    """With learning_rate_schedule=constant: the share of a stage's updates, its last, over which the rate falls to
    0; 0: it stays."""
    loss: str = "squared"
    """Distance to the target that the weighting weighs: squared (mean squared error), l2 (norm, not squared) or
    pseudo_huber."""
    huber_c: float | None = None
    """Of loss=pseudo_huber, sqrt(|d|^2 + c^2) - c; null: 0.00054 times the root of an image's pixels."""
    ema_decays: Any = None
    """Several EMAs at once instead of ema_decay, e.g. [0.99,auto]: the best by the metric is a stage's result."""
    max_teacher_steps: int = 2
    """4 or 8: a stage learns from an earlier one where its steps are at most so many to one."""

    section = "distillation"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("distillation.max_teacher_steps", self.max_teacher_steps, 1)
        _one_of("distillation.learning_rate_schedule", self.learning_rate_schedule, SCHEDULES)
        _one_of("distillation.loss", self.loss, LOSSES)
        if isinstance(self.final_decay, bool) or not 0 <= self.final_decay <= 1:
            raise UserError(f"distillation.final_decay={self.final_decay} must be a share of the updates, 0 to 1")
        if self.huber_c is not None and (self.loss != "pseudo_huber" or not 0 < self.huber_c < math.inf):
            raise UserError(
                f"distillation.huber_c={self.huber_c} must be a number above 0, with distillation.loss=pseudo_huber"
            )
        if self.ema_decays is not None:
            self._check_decays()

    def _check_decays(self) -> None:
        key, given = "distillation.ema_decays", self.ema_decays
        if not isinstance(given, list) or not given or len(set(map(str, given))) < len(given):
            raise UserError(f"{key}={given} must be a list of different decays, e.g. {key}=[0.99,auto]")
        for decay in given:
            _check_decay(key, decay)
        if self.ema_decay is not None:
            raise UserError(f"distillation.ema_decay={self.ema_decay} and {key}={given}: give one of them")

    def _given_decays(self) -> list[Any]:
        return super()._given_decays() if self.ema_decays is None else list(self.ema_decays)


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
            whole(f"{self.section}.updates", self.updates, 1)


@dataclass
class Guiding(Conversion):
    """Of the stage that teaches a student its teacher's guidance."""

    section = "guiding"


@dataclass
class Lora:
    """Of students that train adapters beside their teacher's frozen weights."""

    rank: int | None = None
    """Of the adapters, e.g. 8 or 64, beside the attention's projections; null: the whole network is trained."""

    def __post_init__(self) -> None:
        if self.rank is not None:
            whole("lora.rank", self.rank, 1)


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


def _one_of(key: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{key}={value} must be one of {', '.join(known)}")


def _check_decay(key: str, value: object) -> None:
    """Raises UserError unless an EMA follows from the value."""
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1):
        raise UserError(f"{key}={value} must be a number in [0, 1), or auto, which is 0.001^(1/updates), or null")
