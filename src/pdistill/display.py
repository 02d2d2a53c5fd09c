"""The one line that shows a whole run: the stage and its phase, the time left, loss, metric so far and images/s.

A run is a list of `Part`s, each with the images that networks see in it. The time left is what those to come will take
at the seconds per image of this sitting: of training for training, and of sampling for sampling and measuring, each
standing in for the other until it was measured. So it assumes that a network pass takes the same time in every stage,
and leaves out starting, loading and saving. What was done before a resume is in no rate.

`pdistill.bars` draws the line; where no run is going on, the functions here do nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from pdistill import bars
from pdistill.bars import Bar, Pace

TRAINING, SAMPLING, MEASURING, EXPORTING = "training", "sampling", "measuring", "exporting"  # the phases
AFTERWARDS = "all stages"  # in the place of a stage: what is done for all of them together
JOB = "PDISTILL_JOB"  # of a sweep, in the environment: "2/6"
LEAST = 0.5  # seconds of work that tell a rate


@dataclass
class Part:
    """A phase of a stage."""

    stage: str
    phase: str
    images: float
    """That networks see in it; those of an update with gradients thrice."""
    most_seconds: float = float("inf")
    """Which it takes, where its work is bounded by time."""


@dataclass
class _Rate:
    """Of work: what was done of it in this sitting."""

    images: float = 0.0
    seconds: float = 0.0

    @property
    def is_known(self) -> bool:
        return self.seconds >= LEAST and self.images > 0


@dataclass
class Display:
    """What the line says. Between `__enter__` and `__exit__` every bar of this process shows it."""

    parts: Sequence[Part]
    shown: bool = True
    """False: neither this nor any bar is."""
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self.stages = list(dict.fromkeys(p.stage for p in self.parts if p.stage != AFTERWARDS))
        self.index, self.is_begun = 0, False  # of the part that is worked on
        self.begun: tuple[float, float] | None = None  # of that part: when, and the share of it that was done then
        self.share, self.now = 0.0, bars.time.monotonic()
        self.rates = {True: _Rate(), False: _Rate()}  # of training, and of the other phases
        self.facts: dict[str, Any] = {}
        self.stage_begun = self.now

    def __enter__(self) -> Self:
        Bar.run = self
        return self

    def __exit__(self, *error: object) -> None:
        Bar.run = None

    @property
    def part(self) -> Part:
        """That is worked on."""
        return self.parts[self.index]

    def begin(self, stage: str, phase: str) -> None:
        """What follows is the next part of these words, and those before it are done; unknown ones change nothing."""
        first = self.index + self.is_begun
        alike = (i for i, part in enumerate(self.parts) if i >= first and (part.stage, part.phase) == (stage, phase))
        if (found := next(alike, None)) is None:
            return
        self._keep_rate()
        if stage != self.part.stage:
            self.stage_begun = bars.time.monotonic()
        self.index, self.is_begun, self.begun, self.share = found, True, None, 0.0
        self.facts.pop("images_per_second", None)

    def advanced(self, bar: Bar[Any]) -> None:
        """Reads the clock and what is done, if the bar counts the work of the present part."""
        if bar.options.get("phase") != self.part.phase or not bar.total:
            return
        before, self.share, self.now = self.share, bar.done / bar.total, bars.time.monotonic()
        is_first = self.begun is None or self.share < before
        if is_first:  # it also waits until all is ready, and is in no rate
            self.begun = self.now, self.share

    def _present(self) -> _Rate:
        """Of the part that is worked on."""
        if self.begun is None:
            return _Rate()
        since, share = self.begun
        return _Rate(self.part.images * (self.share - share), self.now - since)

    def _keep_rate(self) -> None:
        present, rate = self._present(), self.rates[self.part.phase == TRAINING]
        rate.images, rate.seconds = rate.images + present.images, rate.seconds + present.seconds

    def _seconds_per_image(self, training: bool) -> float | None:
        present, known = self._present(), []
        for kind in (training, not training):
            before, here = self.rates[kind], (self.part.phase == TRAINING) == kind
            images = before.images + present.images * here
            known.append(_Rate(images, before.seconds + present.seconds * here))
        return next((rate.seconds / rate.images for rate in known if rate.is_known), None)

    def left(self) -> tuple[float | None, float | None]:
        """Seconds that the present stage will take, and the run; None where nothing was measured yet."""
        present = self._present()
        seconds = []
        for i, part in enumerate(self.parts[self.index :]):
            rate = self._seconds_per_image(part.phase == TRAINING)
            if i == 0 and present.is_known:
                rate = present.seconds / present.images
            if rate is None:
                return None, None
            seconds.append(min(part.images * (1 - self.share * (i == 0)) * rate, part.most_seconds))
        of_stage = [
            s for s, part in zip(seconds, self.parts[self.index :], strict=True) if part.stage == self.part.stage
        ]
        return sum(of_stage), sum(seconds)

    def text(self, bar: Bar[Any], columns: int | None = None) -> str:
        """The line: what matters most, and then whatever still fits."""
        phase = bar.options.get("phase") or bar.title
        stage, run = self.left()
        percent = "" if not bar.total else f"{100 * min(bar.done / bar.total, 1):.0f}%"
        metric, value = self.facts.get("metric") or ("", 0.0)
        loss, speed = self.facts.get("loss"), self.facts.get("images_per_second")
        training = phase == TRAINING
        # in the order of the line: (importance, what stands before it, it)
        fields = [
            (8, "", f"job {os.environ[JOB]}, " if JOB in os.environ else ""),
            (0, "", self._where()),
            (4, " ", phase),
            (1, " ", percent),
            (7, ", ", f"{int(bar.done)}/{bar.total} {bar.unit}s" if bar.total and training else ""),
            (1, ", ", "" if stage is None else f"{clock(stage)} left"),
            (2, " ", "" if run is None else f"(run {clock(run)})"),
            (3, ", ", "" if loss is None or not training else f"loss {loss:.3g}"),
            (5, ", ", f"{metric} {value:.4g}" if metric else ""),
            (6, ", ", "" if speed is None or not training else f"{speed:,.0f} images/s"),
        ]
        kept = {0}
        for importance in sorted({f[0] for f in fields}):
            length = sum(len(before) + len(it) for rank, before, it in fields if it and rank in kept | {importance})
            if columns is None or length <= columns:
                kept.add(importance)
        line = "".join(before + it for rank, before, it in fields if it and rank in kept)
        return line if columns is None else line[:columns]

    def _where(self) -> str:
        stage, count = self.part.stage, len(self.stages)
        number = count if stage == AFTERWARDS else self.stages.index(stage) + 1
        return f"{number}/{count} {stage}:"

    def finished(self, stage: str, metric: tuple[str, float] | None, was_done: bool) -> None:
        """Remembers a stage's metric; leaves a line, unless it was finished before this sitting."""
        if metric is not None:
            self.facts["metric"] = metric
        self.facts.pop("loss", None)
        if was_done:
            return
        words = [] if metric is None else [f"{metric[0]} {metric[1]:.4g}"]
        words.append(clock(bars.time.monotonic() - self.stage_begun))
        job = f"job {os.environ[JOB]}, " if JOB in os.environ else ""
        self.say(f"{job}{self._where()} {', '.join(words)}")

    def say(self, line: str) -> None:
        """A line that stays; on a terminal no longer than that is wide."""
        stream = bars.usable_stream()
        if stream is None or not self.shown:
            return
        live = bars.is_live(stream)
        line = line[: bars.columns_of(stream) - 1] if live else line
        forgiving = bars.Forgiving(stream)
        forgiving.write((bars.ERASED if live else "") + line + "\n")
        forgiving.flush()


def begin(stage: str, phase: str) -> None:
    """What follows is this phase of this stage."""
    if isinstance(Bar.run, Display):
        Bar.run.begin(stage, phase)


def finished(stage: str, metric: tuple[str, float] | None, was_done: bool) -> None:
    """A stage is, with its metric; `was_done` before this sitting."""
    if isinstance(Bar.run, Display):
        Bar.run.finished(stage, metric, was_done)


def tell(**facts: Any) -> None:
    """`loss` and `images_per_second` as they were logged last, `metric` as a name and a value."""
    if isinstance(Bar.run, Display):
        Bar.run.facts |= facts


def clock(seconds: float) -> str:
    """0:05, 12:05, 1:02:05, and of days 3d 02:05."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
