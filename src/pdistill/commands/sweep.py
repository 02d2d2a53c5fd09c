"""Tables over runs, and, over seeds, curves with their spread: what a Hydra multirun ends with.

`pdistill sweep outputs/a outputs/b ...` makes them of any runs, and of a W&B project with `pdistill sweep
wandb:<entity>/<project>`.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdistill.commands.arguments import Parser, directory_of, without_imports
from pdistill.commands.run_directory import config_of
from pdistill.commands.run_directory import directory_of as directory_of_run
from pdistill.errors import UserError, first_line, printable
from pdistill.files import digest_of, read_json, whole, write_text
from pdistill.metrics.curve import STUDENTS, teacher_points
from pdistill.metrics.provenance import comparable
from pdistill.report import page, plots, tables, wandb
from pdistill.report.choices import ALWAYS, Config, Made, silent, tell_apart
from pdistill.report.runs import curves_of, finite, metric_keys, ratios_of, rows_of, run_json
from pdistill.steps import TEACHERS

# Table 1 of the paper: FID of undistilled CIFAR-10 models, DDIM and stochastic sampler, means of three seeds.
PAPER_CIFAR10 = {
    ("x_eps", "snr"): ("2.78", "2.54"),
    ("x_eps", "truncated_snr"): ("2.76", "2.47"),
    ("x_eps", "snr_plus_one"): ("2.87", "2.52"),
    ("x", "snr"): ("2.75", "2.65"),
    ("x", "truncated_snr"): ("2.51", "2.53"),
    ("x", "snr_plus_one"): ("2.65", "2.56"),
    ("eps", "snr"): ("2.91", "2.59"),
    ("eps", "truncated_snr"): ("diverges", "diverges"),
    ("eps", "snr_plus_one"): ("3.27", "2.56"),
    ("v", "snr"): ("3.05", "2.65"),
    ("v", "truncated_snr"): ("2.75", "2.45"),
    ("v", "snr_plus_one"): ("2.87", "2.49"),
}
OTHERWISE = "measured otherwise than the first"
FAILED = "failed"
NOT_FINISHED = "not finished"


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its run, what was chosen for it, and its line of error if it failed.

    `choices` are names of parts by their groups, and values of keys that were typed or that differ. The job's result
    is read from its run directory, so that jobs of other processes need to bring no more than these fields.
    """

    name: str
    choices: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    directory: Path | None = None
    """By default outputs/<name>."""
    elsewhere: list[dict] | None = None
    """The rows of the stages of a run that is in no directory here."""

    @property
    def place(self) -> Path:
        name = "wandb" if self.elsewhere is not None else self.name  # whatever somebody called it is no path
        return self.directory or Path("outputs", name)

    @classmethod
    def of_result(cls, result: dict[str, Any]) -> "Job":
        """From what a job leaves in a file: name, output_root, groups (their choices), choices (typed), and error."""
        directory = directory_of_run(result["name"], result["output_root"])
        chosen = {k: str(v) for k, v in (result["groups"] | result["choices"]).items()}
        return cls(result["name"], chosen, result["error"], directory)

    @property
    def stages(self) -> list[dict]:
        """The rows of the stages that are finished, teacher first."""
        return rows_of(self.place) if self.elsewhere is None else self.elsewhere

    @property
    def provenance(self) -> dict:
        return (self.stages[0].get("provenance") or {}) if self.stages else {}

    @property
    def teacher(self) -> bool:
        """Whether its teacher is finished."""
        return any(stage["stage"] == "teacher" for stage in self.stages)

    @property
    def failure(self) -> str | None:
        """Its error, or that it left no result: a job whose process was killed says nothing."""
        finished = self.elsewhere is not None or _finished(self.place)
        return self.error or (None if finished else NOT_FINISHED)


def results_in(folder: Path) -> list[Job]:
    """What the jobs of a sweep left there. Raises UserError for files that no job wrote."""
    try:
        return [Job.of_result(read_json(file)) for file in sorted(folder.glob("*.json"))]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder} holds results that no job wrote ({first_line(error)}): delete it") from error


def finish(jobs: list[Job]) -> None:
    """Writes the table of a sweep, beside its runs, and prints where; raises UserError if a job failed, after writing.

    Jobs that differ in nothing but `seed` are one row, mean and standard deviation; the csv has a row for each job.
    """
    root = jobs[0].place.parent
    names = (job.name if job.place.parent == root else str(job.place) for job in jobs)
    directory = root / f"sweep-{digest_of(names)[:8]}"
    rows = _rows(jobs)
    headings = list(dict.fromkeys(k for row in rows for k in row))
    with whole(directory / "ablation.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, headings)
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    table = tables.over_seeds(rows, apart=(OTHERWISE, FAILED))
    text = "\n".join(tables.markdown(*table))
    write_text(directory / "ablation.md", text + "\n")
    print(f"\n{text}\n\nsweep: {directory / 'ablation.md'} and .csv")
    shown = [(job, row) for job, row in zip(jobs, rows, strict=True) if job.elsewhere is None and job.teacher]
    here = [job.place for job, _ in shown]
    if here:
        page.write(here, directory / "report.html", [_words(row) for _, row in shown])
        print(f"report: {directory / 'report.html'}")
    if here and len(table[1]) == 1:
        _draw_curves(here, directory)
    failed = [job for job in jobs if job.failure]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(job.name for job in failed)}")


def _words(row: "Row") -> dict[str, str]:
    """What tells a job apart, without its metrics."""
    return {key: value for key, value in row.items() if isinstance(value, str)}


def _cell(value: str | float) -> str | float:
    """A value that a spreadsheet shows, and does not compute."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "@", "+", "\t", "\r")) else value


def collect(sources: list[str]) -> list[Job]:
    """Runs, finished or not, as the jobs of a sweep, told apart by what their configurations differ in.

    A source is a run directory, or wandb:<entity>/<project> for all runs of a W&B project. Raises UserError for what
    is neither, and for metrics that cannot be compared, with the keys of their provenance that differ.
    """
    if not sources:
        raise UserError("give runs to collect: directories outputs/<name>, or wandb:<entity>/<project>")
    found = [run for source in sources for run in _found(source)]
    ours = [run for run in found if run.config]
    chosen = iter(tell_apart([Made(run.config, run.facts) for run in ours]))
    jobs = [Job(run.name, next(chosen) if run.config else {}, run.error, run.directory, run.elsewhere) for run in found]
    measured = [job for job in jobs if job.provenance]
    for job in measured[1:]:
        if other := differing(measured[0], job):
            raise UserError(
                f"{job.name} was measured otherwise than {measured[0].name} ({'; '.join(other)}): metrics of "
                f"different provenance are no comparison; measure both alike"
            )
    return jobs


def differing(a: Job, b: Job) -> list[str]:
    """What makes metrics of the one no comparison with those of the other, as "key theirs, there ours"."""
    return comparable(a.provenance, b.provenance) if a.provenance and b.provenance else []


@dataclass(frozen=True)
class Found:
    """A run as it lies somewhere: its configuration, its run.json, and how it ended.

    The configuration of a run of another program, in a W&B project, is empty.
    """

    name: str
    config: Config
    facts: dict[str, Any]
    error: str | None
    directory: Path | None = None
    elsewhere: list[dict] | None = None


def _found(source: str) -> list[Found]:
    if source.startswith("wandb:"):
        return [_of_wandb(run) for run in wandb.Project(source.removeprefix("wandb:")).runs()]
    return [_of_directory(directory_of(source))]


def _of_directory(directory: Path) -> Found:
    config = _config(directory)
    if config is None or "parameterization" not in config:
        raise UserError(
            f"{directory} is no run: give run directories, outputs/<name>, which hold pdistill's config.yaml"
        )
    error = None if _finished(directory) else NOT_FINISHED
    return Found(directory.name, config, run_json(directory), error, directory)


def _config(directory: Path) -> Config | None:
    """A run's configuration; None where there is none. Raises UserError for one that is damaged."""
    if not (directory / "config.yaml").is_file():
        return None
    return config_of(directory)


def _finished(directory: Path) -> bool:
    """Whether the file is there that the run writes last."""
    last = "summary.json" if "teacher" in (_config(directory) or {}) else "teacher/metrics.json"
    return (directory / last).exists()


def _of_wandb(run: Any) -> Found:
    """A run of W&B. It is finished if its last stage is there: W&B's word is "finished" for interrupted runs, too."""
    config, stages, name = dict(run.config), wandb.stages_of(dict(run.summary)), printable(run.name)
    if "parameterization" not in config:
        return Found(name, {}, {}, "no run of pdistill", elsewhere=[])
    steps = config.get("steps")
    plan = (steps.get("plan") if isinstance(steps, dict) else None) or [None]
    plan = plan if isinstance(plan, list) else [None]
    last = f"steps-{plan[-1]:04d}" if "teacher" in config and isinstance(plan[-1], int) else "teacher"
    finished = any(stage["stage"] == last for stage in stages)
    state = "" if run.state == "finished" else f" ({run.state})"
    return Found(name, config, {}, None if finished else NOT_FINISHED + state, elsewhere=stages)


Row = dict[str, "str | float"]


def _rows(jobs: list[Job]) -> list[Row]:
    """The table's rows, one for each job, with the columns of what differs between the jobs."""
    keys = dict.fromkeys(k for job in jobs for k in job.choices if k not in ALWAYS and not silent(k))
    differ = [k for k in keys if len({str(job.choices.get(k, "")) for job in jobs if job.choices}) > 1]
    rows = [_row(job, [*ALWAYS, *differ]) for job in jobs]
    first = next((job for job in jobs if job.provenance), None)
    for job, row in zip(jobs, rows, strict=True):
        if first and (other := differing(first, job)):
            row[OTHERWISE] = "; ".join(other)
    return rows


def _row(job: Job, keys: list[str]) -> Row:
    """What was chosen, and the FID of the teacher and of each student."""
    row: Row = {k: str(job.choices.get(k, "")) for k in keys}
    stages = job.stages
    for key in metric_keys(stages):
        for stage in stages:
            teacher = stage["stage"] == "teacher"
            values = {stage["stage"] if stage["stage"] in TEACHERS else str(stage["num_steps"]): stage.get(key)}
            if teacher and job.elsewhere is None:
                values["teacher, ancestral"] = teacher_points(job.place).get("ancestral", {}).get(stage["num_steps"])
            row |= {f"{key} {column}": v for column, value in values.items() if (v := finite(value)) is not None}
    paper = PAPER_CIFAR10.get((str(row["parameterization"]), str(row["weighting"])))
    if job.choices.get("dataset") == "cifar10" and paper:
        row |= {"paper, DDIM": paper[0], "paper, stochastic": paper[1]}
    return row | ({FAILED: job.failure} if job.failure else {})


def _draw_curves(runs: list[Path], directory: Path) -> None:
    """curve.png and curve.md of runs that differ in their seeds alone and have students."""
    curves = curves_of(*runs)
    if STUDENTS not in curves:
        return
    lines = tables.markdown(*tables.curve_table(curves, ratios_of(*runs)))
    write_text(directory / "curve.md", "\n".join(lines) + "\n")
    plots.plot(curves, "FID", directory / "curve.png")
    print("\n" + "\n".join(lines) + f"\n\ncurves: {directory / 'curve.png'} and .md")


def main(arguments: list[str]) -> None:
    """Makes the tables of the runs that the arguments name. Raises UserError where one is no run, or unfinished."""
    parser = Parser("pdistill sweep", description="Tables over runs, and, over seeds, curves with their spread.")
    parser.add_argument("runs", nargs="+", help="run directories, outputs/<name>, or wandb:<entity>/<project>")
    finish(collect(parser.parse_args(without_imports(arguments)).runs))
