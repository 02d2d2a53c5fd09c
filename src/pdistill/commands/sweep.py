"""Tables over runs, and, over seeds, curves with their spread: what a Hydra multirun ends with.

`python -m pdistill.sweep outputs/a outputs/b ...` makes them of any runs, and of a W&B project with
`python -m pdistill.sweep wandb:<entity>/<project>`.
"""

import csv
import hashlib
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from pdistill import curve, report
from pdistill.commands.run_directory import UNCOMPARED, flat
from pdistill.errors import UserError
from pdistill.report.tables import comparable

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


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its run, what was chosen for it, and its line of error if it failed."""

    name: str
    choices: dict[str, str]
    error: str | None = None
    elsewhere: list[dict] | None = None  # the rows of the stages of a run that is in no directory here

    @property
    def directory(self) -> Path:
        return Path("outputs") / self.name

    @property
    def stages(self) -> list[dict]:
        """The rows of the stages that are finished, teacher first."""
        return report.rows_of(self.directory) if self.elsewhere is None else self.elsewhere

    @property
    def provenance(self) -> dict:
        return self.stages[0].get("provenance", {}) if self.stages else {}


def finish(jobs: list[Job]) -> None:
    """Writes the table of a sweep and prints where; raises UserError if a job failed, after writing.

    Jobs that differ in nothing but `seed` are one row, mean and standard deviation; the csv has a row for each job.
    """
    key = hashlib.sha256("\n".join(job.name for job in jobs).encode()).hexdigest()[:8]
    directory = Path("outputs") / f"sweep-{key}"
    directory.mkdir(parents=True, exist_ok=True)
    rows = [_row(job) for job in jobs]
    for job, row in zip(jobs, rows, strict=True):
        if other := differing(jobs[0], job):
            row["measured otherwise than the first"] = "; ".join(other)
    headings = list(dict.fromkeys(k for row in rows for k in row))
    with (directory / "ablation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, headings)
        writer.writeheader()
        writer.writerows(rows)
    lines = _over_seeds(rows)
    (directory / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines) + f"\n\nsweep: {directory / 'ablation.md'} and .csv")
    here = [job.directory for job in jobs if job.elsewhere is None and job.stages]
    if here:
        report.write(here, directory / "report.html")
        print(f"report: {directory / 'report.html'}")
    if {k for row in rows for k in row if row[k] != rows[0].get(k) and isinstance(row[k], str)} <= {"seed"} and here:
        _draw_curves(here, directory)
    failed = [job for job in jobs if job.error]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(job.name for job in failed)}")


def collect(sources: list[str]) -> list[Job]:
    """Runs, finished or not, as the jobs of a sweep, told apart by what their configurations differ in.

    A source is a directory outputs/<name>, or wandb:<entity>/<project> for all runs of a W&B project. Raises UserError
    for what is neither, and for figures that cannot be compared, with the keys of their provenance that differ.
    """
    from pdistill.parameterization import BY_NAME  # torch, which other users of this module need not wait for

    if not sources:
        raise UserError("give runs to collect: directories outputs/<name>, or wandb:<entity>/<project>")
    names = {cls.__name__: name for name, cls in BY_NAME.items()}
    found = [
        run
        for source in sources
        for run in (_of_wandb(source[6:]) if source.startswith("wandb:") else [_of_directory(Path(source))])
    ]
    configs = [flat(config) for _, config, _, _ in found]
    keys = {key for config in configs for key in config}
    keys = sorted(k for k in keys if len({config.get(k) for config in configs}) > 1)
    jobs = []
    for (name, _, stages, error), config in zip(found, configs, strict=True):
        groups = {
            "parameterization": "parameterization._target_",
            "weighting": "weighting.path",
            "dataset": "dataset._target_",
        }
        choices = {group: config[key].rpartition(".")[2] for group, key in groups.items()}
        choices["parameterization"] = names[choices["parameterization"]]
        choices |= {k: config.get(k, "") for k in keys if k not in groups.values()}
        jobs.append(Job(name, choices, error, stages))
    for job in jobs[1:]:
        if other := differing(jobs[0], job):
            raise UserError(
                f"{job.name} was measured otherwise than {jobs[0].name} ({'; '.join(other)}): figures of "
                f"different provenance are no comparison; measure both alike"
            )
    return jobs


Found = tuple[str, DictConfig, "list[dict] | None", str | None]  # name, configuration, stages' rows, error


def _of_directory(directory: Path) -> Found:
    if directory.parent != Path("outputs") or not (directory / "config.yaml").exists():
        raise UserError(f"{directory} is no run: give directories outputs/<name> that hold a config.yaml")
    config = OmegaConf.load(directory / "config.yaml")
    result = "summary.json" if "distillation" in config else "teacher/metrics.json"
    return directory.name, config, None, None if (directory / result).exists() else "not finished"


def _of_wandb(project: str) -> list[Found]:
    """The runs of a W&B project, their figures from their summaries. Raises UserError where there are none."""
    import wandb

    try:
        runs = list(wandb.Api().runs(project))
    except Exception as error:  # requests', wandb's and GraphQL's own, of many kinds
        raise UserError(f"W&B does not give the runs of {project} ({str(error).splitlines()[0]})") from error
    if not runs:
        raise UserError(f"the W&B project {project} holds no runs")
    found = []
    for run in runs:
        stages: dict[str, dict] = {}
        for key, value in dict(run.summary).items():
            prefix, _, name = key.partition("/")
            if prefix == "teacher" or prefix.startswith("steps_"):
                stages.setdefault(prefix.replace("_", "-"), {})[name] = value
        rows = [{"stage": stage} | row for stage, row in sorted(stages.items(), reverse=True) if "num_steps" in row]
        provenance = dict(run.summary).get("provenance")
        rows = [row | {"provenance": dict(provenance)} if provenance else row for row in rows]
        error = None if run.state == "finished" else run.state
        found.append((run.name, OmegaConf.create(dict(run.config)), rows, error))
    return found


def differing(a: Job, b: Job) -> list[str]:
    """What makes figures of the one no comparison with those of the other, as "key theirs, there ours"."""
    return comparable(a.provenance, b.provenance) if a.provenance and b.provenance else []


def _row(job: Job) -> dict[str, object]:
    """parameterization, weighting, what else was swept, the FID of the teacher and of each student."""
    row: dict[str, object] = {k: job.choices.get(k, "") for k in ("parameterization", "weighting")}
    silent = (*UNCOMPARED, "experiment", "dataset")
    row |= {k: v for k, v in job.choices.items() if k.split(".")[0] not in silent}
    for stage in job.stages:
        column = "teacher" if stage["stage"] == "teacher" else str(stage["num_steps"])
        for key in (k for k in stage if k.startswith("fid")):
            row[f"{key} {column}"] = stage[key]
            if stage["stage"] == "teacher":
                points = curve.teacher_points(job.directory).get("ancestral", {})
                row |= {f"{key} teacher, ancestral": v for n, v in points.items() if n == str(stage["num_steps"])}
    paper = PAPER_CIFAR10.get((row["parameterization"], row["weighting"]))
    if job.choices.get("dataset") == "cifar10" and paper:
        row |= {"paper, DDIM": paper[0], "paper, stochastic": paper[1]}
    if job.error:
        row["failed"] = job.error
    return row


def _over_seeds(rows: list[dict[str, object]]) -> list[str]:
    """Markdown: jobs that differ in nothing but `seed` as one row, mean and standard deviation; the best in bold."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        words = tuple((k, v) for k, v in row.items() if isinstance(v, str) and k != "seed")
        groups.setdefault(words, []).append(row)
    headings = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    means: dict[str, list[float]] = {}
    for members in groups.values():
        for heading in headings:
            if figures := [m[heading] for m in members if isinstance(m.get(heading), float)]:
                means.setdefault(heading, []).append(statistics.mean(figures))
    for words, members in groups.items():
        cells = dict(words) | {"seed": ", ".join(str(m.get("seed", "")) for m in members)}
        for heading in headings:
            figures = [m[heading] for m in members if isinstance(m.get(heading), float)]
            cell = curve.mean_and_spread(figures)
            best = len(groups) > 1 and figures and statistics.mean(figures) == min(means[heading])
            cells.setdefault(heading, f"**{cell}**" if best else cell)
        lines.append("| " + " | ".join(cells[h] for h in headings) + " |")
    return lines


def _draw_curves(runs: list[Path], directory: Path) -> None:
    """curve.png and curve.md of runs that differ in their seeds alone and have students."""
    curves = curve.read(*runs)
    if curve.STUDENTS not in curves or not all(curves[curve.STUDENTS].values()):
        return
    lines = curve.table(curves)
    (directory / "curve.md").write_text("\n".join(lines) + "\n")
    curve.plot(curves, "FID", directory / "curve.png")
    print("\n" + "\n".join(lines) + f"\n\ncurves: {directory / 'curve.png'} and .md")


if __name__ == "__main__":
    try:
        finish(collect(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
