"""`pdistill report outputs/a outputs/b`: one page on runs; `pdistill report wandb:<entity>/<project>`: W&B's own.

`show` is the table that a finished run prints.
"""

from pathlib import Path

from rich.console import Console

from pdistill.commands.arguments import Parser, directory_of, without_imports
from pdistill.commands.run_directory import config_of
from pdistill.errors import UserError, printable
from pdistill.files import read_json
from pdistill.report import page, tables, wandb
from pdistill.report.choices import Made, tell_apart
from pdistill.report.runs import check, is_row, run_json

WANDB = "wandb:"


def main(arguments: list[str]) -> None:
    """Writes the page that the arguments ask for and prints where. Raises UserError where they are no runs."""
    parser = Parser("pdistill report", description="A page on finished runs, or a report of a project in W&B.")
    parser.add_argument("runs", nargs="+", help="run directories, outputs/<name>, or one wandb:<entity>/<project>")
    parser.add_argument("--output", type=Path, help="the page's file; by default report.html beside the first run")
    settings = parser.parse_args(without_imports(arguments))
    if any(run.startswith(WANDB) for run in settings.runs):
        if len(settings.runs) > 1 or settings.output is not None:
            raise UserError("wandb:<entity>/<project> is reported in W&B: give no other run and no --output")
        print(wandb.publish(settings.runs[0].removeprefix(WANDB)))
        return
    runs = [directory_of(run) for run in settings.runs]
    file = settings.output or runs[0].parent / "report.html"
    if file.is_dir():
        raise UserError(f"--output={file} is a directory: give a file, e.g. --output={file / 'report.html'}")
    page.write(runs, file, _told_apart(runs) if len(runs) > 1 else None)
    print(f"wrote {file}")


def _told_apart(runs: list[Path]) -> list[dict[str, str]]:
    """Of each run what it was made of, where the runs differ in it."""
    for run in runs:
        check(run)
    return tell_apart([Made(config_of(run), run_json(run)) for run in runs])


def show(directory: Path) -> None:
    """Prints the table of a finished run (steps, quality, time, speed-up over the teacher) and its report's path."""
    summary = directory / "summary.json"
    rows = read_json(summary)
    if not isinstance(rows, list) or not all(map(is_row, rows)):
        raise UserError(f"{summary} is no list of stages: delete it, and the run's command makes it again")
    console = Console()
    console.print(tables.terminal(*tables.stages(rows), title=str(directory)))
    for note in tables.stage_notes(rows):
        console.print(printable(note), soft_wrap=True, markup=False)
    console.print(f"report: {directory / 'report.html'}", soft_wrap=True, markup=False)
