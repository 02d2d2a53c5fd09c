"""Progress bars with the time left: one line on a terminal, a plain line now and then in a file, a pipe or a CI log.

Every bar of the program is made here. They go to stderr. While a run is going on, its `pdistill.display` says what the
line of any bar says: one display for training, sampling and measuring.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, ClassVar, Generic, Protocol, Self, TextIO, TypedDict, TypeVar, Unpack

from pdistill import processes

T = TypeVar("T")

SECONDS_TO_APPEAR = 1.0  # work that takes less leaves nothing in a file, and no flicker on a terminal
SECONDS_BETWEEN_DRAWINGS = 0.1  # on a terminal
SECONDS_TO_FIRST_LINE = 3.0
SECONDS_BETWEEN_LINES = 10.0
SLOWER, SLOWEST = 1 / 20, 300.0  # of long work: lines come every so much of the time that has passed; at most seconds
COLUMNS = 80  # of a terminal that tells none
COUNTS = "{done}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
FORMATS = {  # by whether the total is known
    True: {"terminal": "{desc}: {percentage:3.0f}%|{bar}| " + COUNTS, "line": "{desc}: {percentage:.0f}% " + COUNTS},
    False: {"terminal": "{desc}: {done} {unit} [{elapsed}, {rate_fmt}]", "line": "{desc}: {done} {unit} [{elapsed}]"},
}
ERASED = "\r\x1b[K"  # to the beginning of the line, and what stood there is gone


class Options(TypedDict, total=False):
    """What a bar may be told beside its items, title, total and unit; all are off by default."""

    initial: int
    """Items that were done before: shown, but not counted in the rate and the time left."""
    leave: bool
    """Whether it stays on a terminal when it is done."""
    everywhere: bool
    """Shown by any process, because one alone does this work; else by the main one."""
    within: bool
    """While an item of another bar is worked on, moves that one on by its share instead of being shown."""
    phase: str
    """What it is in a run, one of the words of `pdistill.display`; else its title."""


class RunDisplay(Protocol):
    """What a bar asks of the run that it is a part of: a `pdistill.display.Display`."""

    shown: bool
    pace: "Pace"

    def advanced(self, bar: "Bar[Any]") -> None:
        """Something was done."""

    def text(self, bar: "Bar[Any]", columns: int | None) -> str:
        """The line to show, of at most so many columns; None: any length."""
        ...


class Bar(Generic[T]):
    """Counts items that are iterated over, or told by `update`."""

    around: "list[Bar[Any]]" = []  # of all bars: those whose item is being worked on, the innermost last
    run: ClassVar[RunDisplay | None] = None  # that is going on

    def __init__(
        self,
        items: Iterable[T] = (),
        title: str = "",
        total: int | None = None,
        unit: str = "it",
        **options: Unpack[Options],
    ) -> None:
        self.items = items
        self.title, self.unit, self.options = title, unit, options
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.done: float = options.get("initial", 0)
        self.item = self.done  # at which the present item began
        self.outer = Bar.around[-1] if options.get("within") and Bar.around else None
        self.outer_done = 0.0 if self.outer is None else self.outer.done
        self.view: _Terminal | _Lines | None = None
        stream = usable_stream()
        silent = Bar.run is not None and not Bar.run.shown
        mine = options.get("everywhere") or processes.is_main()
        if stream is not None and self.outer is None and mine and not silent:
            self.view = (_Terminal if is_live(stream) else _Lines)(Forgiving(stream), self)

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self.items:
                self.item = self.done
                Bar.around.append(self)
                try:
                    yield item
                finally:
                    Bar.around.remove(self)
                self.update(self.item + 1 - self.done)

    def update(self, count: float = 1) -> None:
        """So many items more are done."""
        self.done += count
        if self.outer is not None and self.total:
            share = min(self.outer_done + self.done / self.total, self.outer.item + 1)
            self.outer.update(share - self.outer.done)
        if self.view is not None:
            if Bar.run is not None:
                Bar.run.advanced(self)
            self.view.update()

    def close(self) -> None:
        """Ends the bar. In a file the last line says where, if it took a second or more."""
        if self.view is not None:
            self.view.close()

    @property
    def is_complete(self) -> bool:
        """Whether all was done that there was to do."""
        return self.total is None or self.done >= self.total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def bar(
    items: Iterable[T] = (), title: str = "", total: int | None = None, unit: str = "it", **options: Unpack[Options]
) -> Bar[T]:
    """A bar over `items`, whose number is `total` where they do not tell it themselves.

    `for item in bar(items, "caching", unit="image"): ...` or
    `with bar((), "training", 100, "update") as progress: ... progress.update()`
    """
    return Bar(items, title, total, unit, **options)


class Pace:
    """When the next line is due: after three seconds, then every ten, and of work of hours more seldom."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.due = self.begun + SECONDS_TO_FIRST_LINE

    def printed(self, now: float) -> None:
        """A line was."""
        self.due = now + max(SECONDS_BETWEEN_LINES, min((now - self.begun) * SLOWER, SLOWEST))


class _View:
    """Where a bar is shown."""

    def __init__(self, stream: "Forgiving", bar: Bar) -> None:
        self.stream, self.bar, self.run = stream, bar, Bar.run
        self.initial, self.begun = bar.done, time.monotonic()

    def _text(self, kind: str, now: float, columns: int | None = None) -> str:
        if self.run is not None:
            return self.run.text(self.bar, columns)
        from tqdm import tqdm  # not above: the maths needs torch alone

        bar = self.bar
        total: Any = bar.total  # None is allowed, whatever tqdm declares
        counts: dict[str, Any] = {"done": int(bar.done), "bar_format": FORMATS[total is not None][kind]}
        told = (bar.done, total, now - self.begun, columns, bar.title)
        return tqdm.format_meter(*told, unit=bar.unit, initial=self.initial, **counts)


class _Terminal(_View):
    """One line that is drawn again, ten times a second at most, and never wraps."""

    def __init__(self, stream: "Forgiving", bar: Bar) -> None:
        super().__init__(stream, bar)
        self.due = self.begun + (0 if bar.options.get("leave") else SECONDS_TO_APPEAR)
        self.drawn = False

    def update(self) -> None:
        now = time.monotonic()
        if now >= self.due:
            self._draw(now)

    def _draw(self, now: float) -> None:
        columns = columns_of(self.stream) - 1  # in the last one some terminals wrap
        self.stream.write(ERASED + self._text("terminal", now, columns)[:columns])
        self.stream.flush()
        self.drawn, self.due = True, now + SECONDS_BETWEEN_DRAWINGS

    def close(self) -> None:
        stays = self.bar.options.get("leave") and (self.run is None or not self.bar.is_complete)
        if stays:
            self._draw(time.monotonic())
        if self.drawn:
            self.stream.write("\n" if stays else ERASED)
            self.stream.flush()
        self.drawn = False


class _Lines(_View):
    """A line after three seconds, then one every ten; in a run those of all its bars together."""

    def __init__(self, stream: "Forgiving", bar: Bar) -> None:
        super().__init__(stream, bar)
        self.printed = bar.done
        self.pace = Pace() if self.run is None else self.run.pace

    def update(self) -> None:
        now = time.monotonic()
        if now >= self.pace.due:
            self._print(now)

    def close(self) -> None:
        now = time.monotonic()
        tells = self.run is None or (bool(self.bar.options.get("leave")) and not self.bar.is_complete)
        if tells and now - self.begun >= SECONDS_TO_APPEAR and self.bar.done != self.printed:
            self._print(now)

    def _print(self, now: float) -> None:
        self.stream.write(self._text("line", now) + "\n")
        self.stream.flush()
        self.printed = self.bar.done
        self.pace.printed(now)


class Forgiving:
    """A stream that may be closed, or whose reader may go (`| head`), without ending the work."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Writes, if anybody reads."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        """Flushes, if anybody reads."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def usable_stream() -> TextIO | None:
    """stderr; None where it is absent or closed."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.isatty()  # of None: AttributeError; of a closed one: ValueError
        return sys.stderr
    return None


def is_live(stream: Any) -> bool:
    """Whether a line can be drawn again: on a terminal, but not where a CI service keeps what it shows."""
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return stream.isatty() and not in_ci and os.environ.get("TERM") != "dumb"


def columns_of(stream: Any) -> int:
    """The terminal's width now."""
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS
    return COLUMNS
