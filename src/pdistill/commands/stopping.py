"""What becomes of a command that is asked to stop: by Ctrl-C, by SIGTERM, or by SIGUSR1, a batch system's warning."""

import os
import signal
import subprocess
import sys
import time

from pdistill.errors import Interrupted, first_line
from pdistill.processes import is_main, pass_on

ASKED_AGAIN = (signal.SIGTERM, signal.SIGUSR1)  # what batch systems send, of which a job may be run again
SECONDS_FOR_MAIN = 20.0  # srun --kill-on-bad-exit ends the others with the first that ends
SECONDS_FOR_SLURM = 60.0


def what_remains(command: str) -> str:
    """Of a command that was stopped."""
    if command in ("sample", "export"):
        return "nothing was written"
    return "the same command continues from what is finished"


def end_on_signals(what: str) -> None:
    """Ctrl-C, SIGTERM and SIGUSR1 end a command in a line that says what becomes of its work."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
        pass_on(number)
        raise Interrupted(f"stopped; {what}", number)

    for number in (signal.SIGINT, *ASKED_AGAIN):
        signal.signal(number, interrupt)


def end_where_nothing_does(what: str) -> None:
    """The same in a process that a sweep's launcher started, but for signals that the launcher sees to."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *ASKED_AGAIN)}
    end_on_signals(what)
    for number, handler in handlers.items():
        if callable(handler) and handler is not signal.default_int_handler:
            signal.signal(number, handler)


def requeued(error: BaseException) -> str:
    """Puts a job that Slurm warned back into its queue, and says so; empty where there is nothing to do or to say.

    Slurm sends SIGTERM to what is preempted, and to what a user cancels or what has used up its time, too: these two
    it has ended already, and they are not to come back. Every process calls it; the main one acts.
    """
    job = _job()
    if not isinstance(error, Interrupted) or error.signal not in ASKED_AGAIN or job is None:
        return ""
    for number in ASKED_AGAIN:  # what Slurm sends to a job that it puts back
        signal.signal(number, signal.SIG_IGN)
    if not is_main():
        sys.stdout.flush()
        time.sleep(SECONDS_FOR_MAIN)
        return ""
    if error.signal == signal.SIGTERM and not _still_runs(job):
        return ""
    try:
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as problem:
        told = getattr(problem, "stderr", None) or first_line(problem)
        return f"; Slurm does not run job {job} again ({' '.join(told.split())})"
    return f"; Slurm runs job {job} again"


def _job() -> str | None:
    """The Slurm job that this process belongs to; None elsewhere."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return os.environ.get("SLURM_JOB_ID")


def _still_runs(job: str) -> bool:
    try:
        state = _scontrol("show", "job", job)
    except (OSError, subprocess.SubprocessError):
        return True
    return "JobState=" not in state or "JobState=RUNNING" in state


def _scontrol(*words: str) -> str:
    command = ["scontrol", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS_FOR_SLURM).stdout
