"""Progress bars with the time left: a bar on a terminal, a plain line now and then in a file or a pipe.

Every bar of the program is made here. They go to stderr.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Generic, Self, TextIO, TypedDict, TypeVar, Unpack

from pdistill import processes

T = TypeVar("T")

SECONDS_TO_APPEAR = 1.0  # work that takes less leaves nothing in a file, and no flicker on a terminal
SECONDS_TO_FIRST_LINE = 3.0
SECONDS_BETWEEN_LINES = 10.0
COUNTS = "{done}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
FORMATS = {  # by whether the total is known
    True: {"terminal": "{desc}: {percentage:3.0f}%|{bar}| " + COUNTS, "line": "{desc}: {percentage:.0f}% " + COUNTS},
    False: {"terminal": "{desc}: {done} {unit} [{elapsed}, {rate_fmt}]", "line": "{desc}: {done} {unit} [{elapsed}]"},
}


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


class Bar(Generic[T]):
    """Counts items that are iterated over, or told by `update`."""

    around: "list[Bar[Any]]" = []  # of all bars: those whose item is being worked on, the innermost last

    def __init__(
        self,
        items: Iterable[T] = (),
        title: str = "",
        total: int | None = None,
        unit: str = "it",
        **options: Unpack[Options],
    ) -> None:
        self.items = items
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.done: float = options.get("initial", 0)
        self.item = self.done  # at which the present item began
        self.outer = Bar.around[-1] if options.get("within") and Bar.around else None
        self.outer_done = 0.0 if self.outer is None else self.outer.done
        self.view: _Terminal | _Lines | None = None
        stream = _usable_stream()
        if stream is not None and self.outer is None and (options.get("everywhere") or processes.is_main()):
            self.view = (_Terminal if stream.isatty() else _Lines)(_Forgiving(stream), self, title, unit, options)

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
            self.view.update()

    def close(self) -> None:
        """Ends the bar. In a file the last line says where, if it took a second or more."""
        if self.view is not None:
            self.view.close()

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


class _Terminal:
    """tqdm, which is refreshed ten times a second."""

    def __init__(self, stream: Any, bar: Bar, title: str, unit: str, options: Options) -> None:
        from tqdm import tqdm  # not above: the maths needs torch alone

        class Counted(tqdm):
            @property
            def format_dict(self) -> dict[str, Any]:
                return {**super().format_dict, "done": int(bar.done)}

        self.bar = bar
        self.tqdm = Counted(
            total=bar.total,
            initial=int(bar.done),
            desc=title,
            unit=unit,
            file=stream,
            leave=options.get("leave", False),
            delay=0 if options.get("leave") else SECONDS_TO_APPEAR,
            **_width(stream),
            smoothing=0,
            bar_format=FORMATS[bar.total is not None]["terminal"],
        )

    def update(self) -> None:
        self.tqdm.update(self.bar.done - self.tqdm.n)

    def close(self) -> None:
        self.tqdm.close()


def _width(stream: Any) -> dict[str, Any]:
    """Follows the terminal's; 80 columns where it tells none."""
    with contextlib.suppress(OSError, ValueError):
        if os.get_terminal_size(stream.fileno()).columns:
            return {"dynamic_ncols": True}
    return {"ncols": 80}


class _Lines:
    """A line after three seconds, then one every ten."""

    def __init__(self, stream: Any, bar: Bar, title: str, unit: str, options: Options) -> None:
        self.stream, self.bar, self.title, self.unit = stream, bar, title, unit
        self.initial = self.printed = bar.done
        self.begun = time.monotonic()
        self.due = self.begun + SECONDS_TO_FIRST_LINE

    def update(self) -> None:
        now = time.monotonic()
        if now >= self.due:
            self._print(now)

    def close(self) -> None:
        now = time.monotonic()
        if now - self.begun >= SECONDS_TO_APPEAR and self.bar.done != self.printed:
            self._print(now)

    def _print(self, now: float) -> None:
        from tqdm import tqdm

        total: Any = self.bar.total  # None is allowed, whatever tqdm declares
        counts: dict[str, Any] = {"done": int(self.bar.done)}
        line = tqdm.format_meter(
            self.bar.done,
            total,
            now - self.begun,
            prefix=self.title,
            unit=self.unit,
            initial=self.initial,
            bar_format=FORMATS[self.bar.total is not None]["line"],
            **counts,
        )
        self.stream.write(line + "\n")
        self.stream.flush()
        self.printed, self.due = self.bar.done, now + SECONDS_BETWEEN_LINES


class _Forgiving:
    """A stream that may be closed, or whose reader may go (`| head`), without ending the work."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _usable_stream() -> TextIO | None:
    """stderr; None where it is absent or closed."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.isatty()  # of None: AttributeError; of a closed one: ValueError
        return sys.stderr
    return None
