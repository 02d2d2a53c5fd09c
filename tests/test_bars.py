"""Progress bars: on a terminal, in a file, on a stream that nobody reads, and one inside another."""

import io
import os
import select
import sys

import pytest

from pdistill import bars
from pdistill.bars import Bar, bar


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bars, "time", clock)
    return clock


@pytest.fixture
def log(capsys):
    """log() -> what stderr got since the last call; it is no terminal."""
    return lambda: capsys.readouterr().err


def work(clock: Clock, seconds_each: float, items, title: str, **options) -> None:
    for _ in bar(items, title, **options):
        clock.now += seconds_each


def test_a_log_gets_a_line_after_three_seconds_then_one_in_ten_and_the_last(clock, log):
    work(clock, 0.25, range(160), "caching", unit="image")
    text = log()
    lines = text.splitlines()
    assert len(lines) == 5 and "\r" not in text
    assert lines[0].startswith("caching: 8% 12/160 [00:03<00:37, ")
    assert lines[-1] == "caching: 100% 160/160 [00:40<00:00,  4.00image/s]"


def test_short_work_leaves_nothing_in_a_log(clock, log):
    work(clock, 0.3, range(3), "reading")
    assert log() == ""
    work(clock, 0.4, range(3), "reading")
    assert log().splitlines() == ["reading: 100% 3/3 [00:01<00:00,  2.50it/s]"]


def test_without_a_total_it_counts(clock, log):
    work(clock, 2, iter("abc"), "looking for images", unit="file")
    assert log().splitlines() == ["looking for images: 2 file [00:04]", "looking for images: 3 file [00:06]"]


def test_the_time_left_after_a_resume_is_of_this_sitting(clock, log):
    with bar((), "teacher", 1000, "update", initial=900) as progress:
        for _ in range(5):
            clock.now += 1
            progress.update()
    assert log().splitlines() == [
        "teacher: 90% 903/1000 [00:03<01:37,  1.00update/s]",
        "teacher: 90% 905/1000 [00:05<01:35,  1.00update/s]",
    ]


def test_a_failure_leaves_the_last_state(clock, log):
    with pytest.raises(ZeroDivisionError), bar((), "training", 10, "update") as progress:
        clock.now += 2
        progress.update(4)
        raise ZeroDivisionError
    assert log().startswith("training: 40% 4/10 ")


def test_a_bar_within_another_moves_that_one_and_is_not_shown(clock, log):
    for _ in bar(range(2), "fid, 4 steps", unit="batch"):
        for _ in range(2):  # the second has no share left
            for _ in bar(range(4), "sampling in 4 steps", unit="step", within=True):
                clock.now += 5
    text = log()
    lines = [line.split(", ")[1] for line in text.splitlines()]
    assert "fid" in text and "sampling" not in text
    assert lines[0] == "4 steps: 12% 0/2 [00:05<00:35" and lines[-1].startswith("4 steps: 100% 2/2 [01:15<00:00")
    assert not Bar.around
    work(clock, 2, range(1), "sampling", within=True)
    assert "sampling: 100% 1/1" in log()


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch):
    controller, terminal = os.openpty()
    with os.fdopen(terminal, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(bars, "SECONDS_TO_APPEAR", 0)
        for leave in (False, True):
            with bar((), "teacher", 10, "update", initial=4, leave=leave) as progress:
                progress.update(6)
        monkeypatch.setattr(sys, "stderr", sys.__stderr__)
        shown = ""
        while select.select([controller], [], [], 0.2)[0]:
            shown += os.read(controller, 100_000).decode()
    os.close(controller)
    states = [state for state in shown.split("\r") if "teacher" in state]
    assert states[0].startswith("teacher:  40%|") and "4/10 [00:00<?" in states[-2]
    assert "| 10/10 [00:00<00:00, " in states[-1]
    assert shown.endswith("\n") and shown.count("\n") == 1  # of the one that stays


class Gone(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError


class GoneTerminal(Gone):
    """A terminal that was closed."""

    def isatty(self):
        return True


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed(), Gone(), GoneTerminal()])
def test_a_stream_that_nobody_reads_ends_nothing(clock, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    work(clock, 5, range(10), "training", leave=True)
    assert clock.now == 50


def test_a_stream_closed_on_the_way_ends_nothing(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for k in bar(range(10), "training"):
        clock.now += 5
        if k == 4:
            log.close()
    assert clock.now == 50


def test_only_the_main_process_shows_it(clock, log, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    work(clock, 5, range(3), "training")
    assert log() == ""
    work(clock, 5, range(3), "caching", everywhere=True)
    assert log().startswith("caching: ")
