"""What lies in a run directory, read leniently: values that are missing or not finite are left out, not an error."""

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from pdistill.bars import bar
from pdistill.checks import is_count
from pdistill.errors import UserError
from pdistill.files import read_json
from pdistill.metrics.curve import STUDENTS, Curves, teacher_points
from pdistill.metrics.provenance import are_measured, fingerprint_at, is_provenance
from pdistill.reading import regular
from pdistill.steps import TEACHERS, is_student

LONGEST_STEP = 16  # digits of an update
KEY_OF_WEIGHTS = "denoiser_fingerprint"  # in a provenance since 0.2.0


def finite(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def metric_keys(rows: list[dict]) -> list[str]:
    """The names of the FIDs in the rows of stages, in their order, that at least one row has a value of."""
    keys = dict.fromkeys(k for row in rows for k in row if k.startswith("fid") and not k.endswith("_std"))
    return [k for k in keys if any(finite(row.get(k)) is not None for row in rows)]


def place_in_table(row: dict) -> tuple[int, int]:
    """Sorts stages: the teacher, the converted one, a student of several counts, then students by falling count."""
    stage = row["stage"]
    return (TEACHERS.index(stage) if stage in TEACHERS else len(TEACHERS) + is_student(stage), -row["num_steps"])


def rows_of(directory: Path) -> list[dict]:
    """The rows (metrics.json) of the stages that are finished, teacher first, then by falling step count.

    Raises UserError for a file that is damaged.
    """
    rows = []
    for path in [p for name in (*TEACHERS, "parallel-*", "steps-*") for p in directory.glob(f"{name}/metrics.json")]:
        row = read_json(path)
        if not is_row(row) or row["stage"] != path.parent.name:  # a path, which other files are found by
            raise UserError(
                f"{path} is damaged (no row of stage {path.parent.name} with its num_steps): delete it and run the "
                f"command again"
            )
        rows.append(row)
    return sorted(rows, key=place_in_table)


def drawn_once(rows: list[dict]) -> list[dict]:
    """The stages without a student of several step counts where its fused one draws the same."""
    fused = {row["num_steps"] for row in rows if is_student(row["stage"])}
    return [row for row in rows if not (row["stage"].startswith("parallel-") and row["num_steps"] in fused)]


def is_row(row: object) -> bool:
    """Whether it can be the row of a stage."""
    known = isinstance(row, dict) and isinstance(row.get("stage"), str) and is_count(row.get("num_steps"))
    return known and (row.get("provenance") is None or is_provenance(row["provenance"]))  # type: ignore[union-attr]


def check(directory: Path) -> None:
    """Raises UserError unless the directory is a run whose teacher at least is finished."""
    if not (directory / "config.yaml").is_file():
        what = "is no run of pdistill (it holds no config.yaml)" if directory.is_dir() else "does not exist"
        raise UserError(f"{directory} {what}: give run directories, e.g. outputs/demo")
    if not any(row["stage"] == "teacher" for row in rows_of(directory)):
        raise UserError(
            f"{directory} has no finished stage yet: run its command again, which goes on from where it was"
        )


def run_json(directory: Path) -> dict:
    """What a run says of itself (version, choices, teacher, data, ...); empty for a run of 0.1.0."""
    return _object(directory / "run.json")


def curves_of(*runs: Path) -> Curves:
    """The curves of runs of one kind, each with another seed, from their metrics.json and teacher/curve.json."""
    curves: Curves = defaultdict(lambda: defaultdict(list))
    for run in runs:
        rows = rows_of(run)
        for key in metric_keys(rows)[:1]:
            for row in rows:
                if is_student(row["stage"]) and finite(row.get(key)) is not None:
                    curves[STUDENTS][row["num_steps"]].append(float(row[key]))
        for sampler, points in teacher_points(run).items():
            for num_steps, value in points.items():
                if finite(value) is not None:
                    curves[f"teacher, {sampler}"][num_steps].append(float(value))
    return {name: dict(points) for name, points in curves.items()}


def ratios_of(*runs: Path) -> dict[int, list[float]]:
    """At each step count, each run's student over its own teacher's DDIM at the most steps that were measured."""
    ratios: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        curves = curves_of(run)
        ddim = curves.get("teacher, ddim")
        if ddim and ddim[max(ddim)][0] > 0:
            for num_steps, (value, *_) in curves.get(STUDENTS, {}).items():
                ratios[num_steps].append(value / ddim[max(ddim)][0])
    return dict(ratios)


def losses_of(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Of each stage (update, loss), from what logger=csv wrote, restarts included; empty with another logger."""
    losses: dict[str, dict[int, float]] = {}
    versions = [path for path in (directory / "csv").glob("version_*/metrics.csv") if path.parent.name[8:].isdecimal()]
    for path in sorted(versions, key=lambda path: int(path.parent.name[8:])):
        regular(path)
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = csv.DictReader(line.replace("\0", "") for line in file)
            try:
                for row in rows:
                    step = row.get("step") or ""
                    for key, value in row.items() if step.isdecimal() and len(step) < LONGEST_STEP else ():
                        loss = _parsed(value) if key and key.endswith("/loss") else None
                        if loss is not None:
                            losses.setdefault(key.removesuffix("/loss"), {})[int(step)] = loss
            except csv.Error as error:
                raise UserError(f"{path} is damaged ({error}): delete it") from error
    return {stage: sorted(points.items()) for stage, points in losses.items()}


@dataclass(frozen=True)
class Frame:
    """A few samples of a stage, always from the same noise, after so many updates, and what was measured then."""

    update: int
    picture: Path
    metrics: dict[str, float]


def film_of(directory: Path, row: dict) -> list[Frame]:
    """The frames of a stage in their order; the last is of the finished denoiser, whose metrics are in its row."""
    frames = []
    for picture in sorted((directory / row["stage"] / "film").glob("*.png")):
        if picture.stem.isdecimal() and len(picture.stem) < LONGEST_STEP:
            update = int(picture.stem)
            measured = row if update == row.get("updates") else _object(picture.with_suffix(".json"))
            values = {key: finite(measured.get(key)) for key in metric_keys([measured])}
            frames.append(Frame(update, picture, {k: v for k, v in values.items() if v is not None}))
    return frames


def evaluation_of(directory: Path) -> list[dict]:
    """The rows that evaluate.py measured of the denoisers that the run holds now, real images included.

    A row is dropped where its hash of the weights is none of theirs, and where it has no such hash (it is of 0.1.0)
    though the run is of a later version: both were measured of weights that have since been replaced.
    """
    path = directory.parent / "evaluations" / f"{directory.name}.json"
    rows = read_json(path, [])
    if not are_measured(rows):
        raise UserError(f"{path} is damaged (no list of rows with their provenance): delete it and evaluate again")
    known = any(row["provenance"].get(KEY_OF_WEIGHTS) for row in rows)
    present = _fingerprints(directory) if known else set()
    anew = bool(run_json(directory))

    def current(made_with: dict) -> bool:
        if made_with.get("denoiser") is None:
            return True  # of real images
        weights = made_with.get(KEY_OF_WEIGHTS)
        return weights in present if weights else not anew

    rows = [row for row in rows if current(row["provenance"])]
    return rows if any(row["provenance"].get("num_steps") for row in rows) else []


def _fingerprints(directory: Path) -> set[str | None]:
    """Hashes of the weights of the run's denoisers, None among them where one cannot be loaded."""
    denoisers = [directory / row["stage"] / "denoiser" for row in rows_of(directory)]
    return {fingerprint_at(d) for d in bar(denoisers, f"weights of {directory.name}", unit="denoiser")}


def _object(path: Path) -> dict:
    """A JSON object; empty where there is none."""
    content = read_json(path, {})
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object): {json.dumps(content)[:50]}")
    return content


def _parsed(text: object) -> float | None:
    try:
        return finite(float(str(text)))
    except ValueError:
        return None
