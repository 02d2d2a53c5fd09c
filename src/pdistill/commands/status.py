"""`pdistill status`: the runs below a directory, how far they are, and whether somebody is writing them."""

import fcntl
import time
from pathlib import Path

from pdistill.commands.arguments import Parser, without_imports
from pdistill.errors import UserError
from pdistill.files import read_json
from pdistill.report import tables
from pdistill.report.runs import losses_of, metric_keys, rows_of

UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def main(arguments: list[str]) -> None:
    """Prints a line for each run. Raises UserError where there is none."""
    parser = Parser("pdistill status", description="The runs below a directory: their stage, metric and writer.")
    parser.add_argument("root", nargs="?", type=Path, default=Path("outputs"), help="default: outputs")
    root = parser.parse_args(without_imports(arguments)).root.expanduser()
    runs = sorted(file.parent for file in root.glob("*/config.yaml"))
    if not runs:
        raise UserError(f"{root} holds no runs: give the directory that they are in, by default outputs")
    lines = [words_of(run) for run in runs]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def words_of(run: Path) -> tuple[str, str, str, str]:
    """Name, state, last change, and the last stage with its metric, or what is damaged."""
    changed = ago(time.time() - last_change(run))
    try:
        rows, finished = rows_of(run), is_finished(run)
        state = "running" if is_written(run) else "finished" if finished else "stopped"
        what = [] if finished else [in_training(run)]
        if rows:
            keys = metric_keys(rows[-1:])[:1]
            what = [", ".join([tables.title(rows[-1]), *(f"{k} {tables.words(rows[-1][k])}" for k in keys)]), *what]
        return run.name, state, changed, "; ".join(filter(None, what))
    except UserError as error:
        return run.name, "damaged", changed, str(error)


def is_finished(run: Path) -> bool:
    """Whether the run's command has nothing left to do."""
    students = (run / "summary.json").exists()
    return students or (not any(run.glob("*-[0-9][0-9][0-9][0-9]")) and _teacher_alone(run))


def _teacher_alone(run: Path) -> bool:
    row = read_json(run / "teacher" / "metrics.json", {})
    return isinstance(row, dict) and "seconds_per_image" in row


def is_written(run: Path) -> bool:
    """Whether a process holds the run's lock."""
    try:
        with (run.parent / f".{run.name}.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def in_training(run: Path) -> str:
    """The stage that has a checkpoint, and its last update in the log of logger=csv."""
    begun = [d for d in run.iterdir() if d.is_dir() and any(d.glob("*.ckpt"))]
    if not begun:
        return ""
    stage = max(begun, key=lambda directory: directory.stat().st_mtime).name
    logged = losses_of(run).get(stage.replace("-", "_"))
    return f"training {stage}" + (f", update {logged[-1][0]}" if logged else "")


def last_change(run: Path) -> float:
    """Seconds since the epoch."""
    return max(path.stat().st_mtime for path in [run, *run.glob("*"), *run.glob("*/*")] if path.exists())


def ago(seconds: float) -> str:
    """3 min ago"""
    size, unit = next((u for u in UNITS if seconds >= u[0]), UNITS[-1])
    return f"{max(0, int(seconds // size))} {unit} ago"
