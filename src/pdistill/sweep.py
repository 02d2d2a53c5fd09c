"""Tables over runs, and, over seeds, curves with their spread: what a Hydra multirun ends with.

`python -m pdistill.sweep outputs/a outputs/b ...` makes them of any finished runs.
"""

import csv
import hashlib
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from pdistill import curve
from pdistill.errors import UserError
from pdistill.figures import comparable
from pdistill.run import UNCOMPARED, flat

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

    @property
    def directory(self) -> Path:
        return Path("outputs") / self.name

    @property
    def provenance(self) -> dict:
        path = self.directory / "teacher" / "metrics.json"
        return json.loads(path.read_text()).get("provenance", {}) if path.exists() else {}


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
    failed = [job for job in jobs if job.error]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(job.name for job in failed)}")
    if {k for row in rows for k in row if row[k] != rows[0].get(k) and isinstance(row[k], str)} <= {"seed"}:
        _draw_curves(jobs, directory)


def collect(directories: list[str]) -> list[Job]:
    """Finished runs as the jobs of a sweep, told apart by what their configurations differ in.

    Raises UserError for a directory that is no run under outputs/, and for figures that cannot be compared, with the
    keys of their provenance that differ.
    """
    from pdistill.parameterization import BY_NAME  # torch, which other users of this module need not wait for

    names = {cls.__name__: name for name, cls in BY_NAME.items()}
    configs = {}
    for directory in map(Path, directories):
        if directory.parent != Path("outputs") or not (directory / "config.yaml").exists():
            raise UserError(f"{directory} is no run: give directories outputs/<name> that hold a config.yaml")
        configs[directory.name] = flat(OmegaConf.load(directory / "config.yaml"))
    keys = {key for config in configs.values() for key in config}
    keys = sorted(k for k in keys if len({config.get(k) for config in configs.values()}) > 1)
    jobs = []
    for name, config in configs.items():
        groups = {
            "parameterization": "parameterization._target_",
            "weighting": "weighting.path",
            "dataset": "dataset._target_",
        }
        choices = {group: config[key].rpartition(".")[2] for group, key in groups.items()}
        choices["parameterization"] = names[choices["parameterization"]]
        jobs.append(Job(name, choices | {k: config.get(k, "") for k in keys if k not in groups.values()}))
    for job in jobs[1:]:
        if other := differing(jobs[0], job):
            raise UserError(
                f"{job.directory} was measured otherwise than {jobs[0].directory} ({'; '.join(other)}): figures of "
                f"different provenance are no comparison; measure both alike"
            )
    return jobs


def differing(a: Job, b: Job) -> list[str]:
    """What makes figures of the one no comparison with those of the other, as "key theirs, there ours"."""
    return comparable(a.provenance, b.provenance) if a.provenance and b.provenance else []


def _row(job: Job) -> dict[str, object]:
    """parameterization, weighting, what else was swept, the FID of the teacher and of each student."""
    row: dict[str, object] = {k: job.choices.get(k, "") for k in ("parameterization", "weighting")}
    silent = (*UNCOMPARED, "experiment", "dataset")
    row |= {k: v for k, v in job.choices.items() if k.split(".")[0] not in silent}
    for metrics in sorted(job.directory.glob("*/metrics.json"), reverse=True):
        stage = json.loads(metrics.read_text())
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


def _draw_curves(jobs: list[Job], directory: Path) -> None:
    """curve.png and curve.md of runs that differ in their seeds alone and have students."""
    curves = curve.read(*(job.directory for job in jobs))
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
