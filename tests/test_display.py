"""The display of a run: its line on terminals of any width, in pipes, CI logs and notebooks, and after a resume."""

import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from clock import Clock

from pdistill import display
from pdistill.bars import bar
from pdistill.commands.jobs import _choices_of
from pdistill.display import AFTERWARDS, MEASURING, SAMPLING, TRAINING, Display, Part

ROOT = Path(__file__).parent.parent


def parts() -> list[Part]:
    """A teacher of 100 updates, and students of which the last takes twice as long."""
    found = []
    for name, images in (("teacher", 300.0), ("steps-0002", 500.0), ("steps-0001", 1000.0)):
        found += [Part(name, TRAINING, images), Part(name, MEASURING, 100.0), Part(name, SAMPLING, 10.0)]
    return [*found, Part(AFTERWARDS, MEASURING, 1e9, most_seconds=20)]


def work(clock: Clock, phase: str, total: int, seconds_each: float, initial: int = 0) -> None:
    with bar((), "work", total, "update", phase=phase, initial=initial, leave=phase == TRAINING) as progress:
        for _ in range(total - initial):
            clock.now += seconds_each
            progress.update()


def run(clock: Clock, kind: type[Display] = Display) -> None:
    """All of it: 0.3 s an update, whatever its passes; an evaluation takes 0.05 s."""
    with kind(parts()):
        for name, images in (("teacher", 300), ("steps-0002", 500), ("steps-0001", 1000)):
            display.begin(name, TRAINING)
            display.tell(loss=0.01234, images_per_second=412.3)
            work(clock, TRAINING, images // 3, 0.3)
            display.begin(name, MEASURING)
            work(clock, MEASURING, 10, 0.5)
            display.begin(name, SAMPLING)
            work(clock, SAMPLING, 10, 0.05)
            display.finished(name, ("fid_classifier", 8.594321), was_done=False)
        display.begin(AFTERWARDS, MEASURING)
        work(clock, MEASURING, 10, 1)


def test_the_time_left_is_of_passes_and_of_this_sitting(clock, capsys):
    run(clock)
    lines = capsys.readouterr().err.splitlines()
    # 89 updates of 0.3 s, then 110 evaluations at the rate of a pass until one was measured: 26.7 s + 11 s
    assert lines[0] == ("1/3 teacher: training 11%, 11/100 updates, 0:38 left (run 3:50), loss 0.0123, 412 images/s")
    assert not any("left (run" not in line for line in lines if "%" in line)
    done = [line for line in lines if "%" not in line]
    assert [line.split(", ")[0] for line in done] == [
        f"{k}/3 {name}: fid_classifier 8.594" for k, name in ((1, "teacher"), (2, "steps-0002"), (3, "steps-0001"))
    ]
    assert done[0].endswith(", 0:36")  # 30 + 5 + 0.5 seconds
    assert lines[-1].startswith("3/3 all stages: measuring ") and lines[-1].endswith("), fid_classifier 8.594")


def test_nearly_right_from_the_first_stage_on(clock):
    said: list[tuple[float, float | None]] = []

    class Noted(Display):
        def advanced(self, bar):
            super().advanced(bar)
            said.append((clock.now, self.left()[1]))

    run(clock, Noted)
    wrong = [left + at - clock.now for at, left in said if left is not None and at < clock.now - 30]
    assert len(wrong) > 400 and max(map(abs, wrong)) < 0.15 * clock.now


def test_after_a_resume_nothing_of_before_is_in_a_rate(clock, capsys):
    """Updates 1 to 90 were another sitting's; a finished stage counts, and is not told again."""
    with Display(parts()):
        display.finished("teacher", ("fid_classifier", 9.0), was_done=True)
        display.begin("steps-0002", TRAINING)
        work(clock, TRAINING, 166, 1.0, initial=160)
    first, *_ = capsys.readouterr().err.splitlines()
    # 3 updates to go, 110 + 1110 evaluations and passes after them, all at 166 s for 500
    assert first.startswith("2/3 steps-0002: training 98%, 163/166 updates, ")
    stage, whole = re.findall(r"(\d+:\d+)", first)
    assert stage == display.clock(3 + 110 * 166 / 500) and whole == display.clock(3 + (110 + 1110) * 166 / 500 + 20)
    assert first.endswith("fid_classifier 9")


def test_the_most_important_fits(clock):
    os.environ[display.JOB] = "2/6"
    try:
        with Display(parts()) as shown:
            display.begin("steps-0002", TRAINING)
            display.tell(loss=0.01234, images_per_second=1412.3, metric=("fid_classifier", 8.594321))
            progress = bar((), "work", 166, "update", phase=TRAINING)
            for _ in range(16):
                clock.now += 60
                progress.update()
            texts = {columns: shown.text(progress, columns) for columns in range(1, 200)}
    finally:
        del os.environ[display.JOB]
    assert all(len(text) <= columns for columns, text in texts.items())
    for word in ("2/3 steps-0002:", "10%", "left", "(run"):
        assert word in texts[59]
    for word in ("training", "loss 0.0123", "fid_classifier 8.594"):
        assert word in texts[99]
    assert texts[199].startswith("job 2/6, 2/3 steps-0002: training 10%, 16/166 updates, ")
    assert texts[199].endswith("loss 0.0123, fid_classifier 8.594, 1,412 images/s")


def on_a_terminal(columns: int, work, monkeypatch) -> str:
    """What is written to a terminal of so many columns."""
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written: list[str] = []
    reader = threading.Thread(target=lambda: written.append(read_all(controller)))  # it holds no more than 4 kB
    reader.start()
    with os.fdopen(terminal, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        work()
        monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    reader.join()
    return written[0]


def read_all(controller: int) -> str:
    """What the other end writes until it is closed."""
    text = b""
    try:
        while part := os.read(controller, 100_000):
            text += part
    except OSError:  # which is how a terminal ends
        pass
    os.close(controller)
    return text.decode()


def drawn(text: str) -> list[str]:
    """Every state of the terminal's line, and the lines that stay."""
    return [state for state in re.split(r"\r\x1b\[K|\r\n|\n|\r", text) if state]


@pytest.mark.parametrize("columns", [60, 100])
def test_nothing_wraps_on_a_terminal(clock, monkeypatch, columns):
    for name in ("CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    text = on_a_terminal(columns, lambda: run(clock), monkeypatch)
    assert "\x1b" not in text.replace("\r\x1b[K", "") and max(map(len, drawn(text))) < columns
    stays = [line for line in text.split("\n") if line]
    assert len(stays) == 4 and stays[-1].endswith("\r\x1b[K")  # a line for each stage; the last is erased
    assert any("training 50%" in state or " 50%" in state for state in drawn(text))


@pytest.mark.parametrize("environment", [{"CI": "true", "TERM": "xterm"}, {"TERM": "dumb"}])
def test_a_ci_log_gets_plain_lines(clock, monkeypatch, environment):
    monkeypatch.delenv("CI", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = on_a_terminal(80, lambda: run(clock), monkeypatch).replace("\r\n", "\n")  # of the terminal's own
    assert "\r" not in text and "\x1b" not in text
    assert 180 / 10 < len(text.splitlines()) < 220 / 10 + 8


def test_long_work_tells_less_often(clock, capsys):
    with Display([Part("teacher", TRAINING, 1.0)]):
        display.begin("teacher", TRAINING)
        work(clock, TRAINING, 72 * 360, 10.0)
    lines = capsys.readouterr().err.splitlines()
    assert 72 * 12 < len(lines) < 72 * 12 + 200  # three days: every five minutes


def test_a_run_that_shows_nothing(clock, monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    with Display(parts(), shown=False) as shown:
        display.begin("teacher", TRAINING)
        work(clock, TRAINING, 100, 1.0)
        shown.say("a line")
    assert err.getvalue() == ""
    work(clock, MEASURING, 100, 1.0)  # of no run
    assert err.getvalue().startswith("work: ")


def test_how_many_jobs_a_sweep_has():
    words = ["seed=0,1,2", "training.updates=range(1,5)", "parameterization=x,v", "name=a", "+steps=glob(*)"]
    assert _choices_of(words) == {"seed": 3, "training.updates": 4, "parameterization": 2, "steps": None}


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 100])
def test_a_whole_run_on_a_terminal(workplace, columns):
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"TERM": "xterm"}
    environment["PDISTILL_CACHE"] = str(workplace / "cache")
    words = [sys.executable, ROOT / "distill.py", "experiment=smoke", f"name=terminal{columns}"]
    with subprocess.Popen(words, cwd=workplace, env=environment, stderr=terminal, stdout=subprocess.DEVNULL) as process:
        os.close(terminal)
        text = read_all(controller)
    assert process.returncode == 0
    assert max(map(len, drawn(text))) < columns
    kept = [drawn(line)[-1] for line in text.split("\r\n") if drawn(line)]
    assert [line.split(":")[0] for line in kept][-4:] == [
        "1/4 teacher",
        "2/4 steps-0004",
        "3/4 steps-0002",
        "4/4 steps-0001",
    ]


@pytest.mark.slow
def test_a_notebook_gets_plain_lines():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    code = (
        "import time\nfrom pdistill import bars, display\nfrom pdistill.bars import bar\n"
        "bars.SECONDS_TO_FIRST_LINE = bars.SECONDS_BETWEEN_LINES = bars.SLOWER = 0\n"
        "with display.Display([display.Part('teacher', display.TRAINING, 10)]) as shown:\n"
        "    display.begin('teacher', display.TRAINING)\n"
        "    for _ in bar(range(4), 'teacher', unit='update', phase=display.TRAINING): time.sleep(0.3)\n"
        "    display.finished('teacher', ('fid', 2.0), was_done=False)\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    text = "".join(output["text"] for output in notebook.cells[0].outputs)
    assert "\r" not in text and "\x1b" not in text
    assert text.splitlines()[-2].startswith("1/1 teacher: training 100%, 4/4 updates, 0:00 left (run 0:00)")
    assert text.splitlines()[-1] == "1/1 teacher: fid 2, 0:01"
