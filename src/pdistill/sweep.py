"""The table over a Hydra multirun: ablation.md and ablation.csv."""

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pdistill.errors import UserError
from pdistill.run import UNCOMPARED


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its run, what was chosen for it, and its line of error if it failed."""

    name: str
    choices: dict[str, str]
    error: str | None = None


def finish(jobs: list[Job]) -> None:
    """Writes the table of a sweep and prints where; raises UserError if a job failed, after writing."""
    key = hashlib.sha256("\n".join(job.name for job in jobs).encode()).hexdigest()[:8]
    directory = Path("outputs") / f"sweep-{key}"
    directory.mkdir(parents=True, exist_ok=True)
    rows = [_row(job) for job in jobs]
    headings = list(dict.fromkeys(k for row in rows for k in row))
    with (directory / "ablation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, headings)
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    for row in rows:
        values = (row.get(h, "") for h in headings)
        lines.append("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values) + " |")
    (directory / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines) + f"\n\nsweep: {directory / 'ablation.md'} and .csv")
    failed = [job for job in jobs if job.error]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(job.name for job in failed)}")


def _row(job: Job) -> dict[str, object]:
    """parameterization, weighting, what else was swept, the FID of the teacher and of each student."""
    directory = Path("outputs") / job.name
    row: dict[str, object] = {k: job.choices.get(k, "") for k in ("parameterization", "weighting")}
    row |= {k: v for k, v in job.choices.items() if k.split(".")[0] not in (*UNCOMPARED, "experiment")}
    for metrics in sorted(directory.glob("*/metrics.json"), reverse=True):
        stage = json.loads(metrics.read_text())
        column = "teacher" if stage["stage"] == "teacher" else str(stage["num_steps"])
        for key in (k for k in stage if k.startswith("fid")):
            row[f"{key} {column}"] = stage[key]
    if job.error:
        row["failed"] = job.error
    return row
