"""Settings of the metrics group, checked when they are made; no torch, so that composing stays quick."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdistill import registry
from pdistill.checks import whole
from pdistill.errors import UserError

LEAST_SAMPLES = 2  # that have a covariance
LEAST_EXTRAPOLATED = 20  # whose tenth has one: what FID-infinity starts from


@dataclass
class Metrics:
    """With what, and with how many samples, denoisers are measured."""

    extractor: Any = None
    """A function of the dataset that gives the feature extractor; null: nothing is measured."""
    num_samples: int = 2000
    """Samples to measure. FID of few is biased upwards: use more than the extractor has features."""
    every_n_updates: int | None = None
    """Also measure every so many updates of a training; null: only at its end."""
    teacher_curve: Any = None
    """Also measure the teacher by itself, e.g. {steps: [1,2,4], samplers: [ddim,ancestral]}; null: do not."""

    def __post_init__(self) -> None:
        if self.extractor is not None:
            whole("metrics.num_samples", self.num_samples, LEAST_SAMPLES)
        if self.every_n_updates is not None:
            whole("metrics.every_n_updates", self.every_n_updates, 1)
            if self.extractor is None:
                raise UserError(
                    f"metrics.every_n_updates={self.every_n_updates} asks for a metric while training, and "
                    f"metrics=none measures nothing: use metrics=classifier or metrics=inception, or set it to null"
                )
        self.check_samplers()

    def check_samplers(self, of_teacher: Callable[[str], object] = lambda name: None) -> None:
        """Raises UserError unless `teacher_curve` lists step counts, and samplers that are built in or registered.

        And where `of_teacher`, called with each of these, raises ValueError.
        """
        if self.teacher_curve is None:
            return
        curve, known = self.teacher_curve, registry.names("sampler")
        complete = isinstance(curve, dict) and set(curve) == {"steps", "samplers"}
        samplers = curve["samplers"] if complete else None
        known_ones = isinstance(samplers, list) and samplers and all(name in known for name in samplers)
        if not known_ones or not are_step_counts(curve["steps"]):
            raise UserError(
                f"metrics.teacher_curve={curve} must be null or list step counts and samplers, e.g. "
                f"metrics.teacher_curve={{steps:[1,2,4],samplers:[ddim,ancestral]}} (samplers: {', '.join(known)})"
            )
        try:
            for name in curve["samplers"]:
                of_teacher(name)
        except ValueError as error:
            raise UserError(f"metrics.teacher_curve={curve}: {error}") from error


def are_step_counts(values: object) -> bool:
    """Whether this is a list of one or more whole numbers, none below 1."""
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in values)
    )
