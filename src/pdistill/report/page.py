"""report.html: what finished runs achieved, in a sentence, a picture and a chart, and then the rest."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape

from pdistill import __version__
from pdistill.errors import UserError, first_line, printable
from pdistill.files import write_text
from pdistill.metrics.provenance import comparable
from pdistill.reading import text_of
from pdistill.report import charts, headline, tables
from pdistill.report.pictures import embedded, some, strip
from pdistill.report.rounding import number
from pdistill.report.runs import (
    Frame,
    check,
    curves_of,
    drawn_once,
    evaluation_of,
    film_of,
    finite,
    losses_of,
    metric_keys,
    rows_of,
    run_json,
)
from pdistill.steps import is_student

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # characters that no page needs, and a terminal would obey
EVALUATIONS, SECONDS = "network evaluations per image", "seconds per image"
PRINTED_FILMS, PRINTED_FRAMES = 6, 8  # on paper
SAME_NOISE = "The same noise at every step count"
Choices = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Table:
    """Of a page of tables; `names` are the lines of the page's chart that go with the rows, if any."""

    title: str
    headings: list[str]
    lines: list[list[str]]
    names: list[str] | None = None


def write(directories: list[Path], file: Path, choices: Choices | None = None) -> None:
    """A page on runs, which needs no other file and no network. `choices` of each run are what tells it apart.

    Raises UserError for a directory that is no run, or has no finished stage, and for damaged files.
    """
    told = dict(zip(directories, choices or [{}] * len(directories), strict=True))  # each run once
    for directory in told:
        check(directory)
    runs = [_of_run(directory, name) for directory, name in zip(told, _names(list(told)), strict=True)]
    first = _of_several(list(told), runs, list(told.values())) if len(runs) > 1 else _of_one(directories[0], runs[0])
    render(file, runs=runs, **first)


def _names(directories: list[Path]) -> list[str]:
    """What runs are called, each otherwise: by their directories' names, by their paths where these are equal."""
    names = Counter(directory.name for directory in directories)
    found: list[str] = []
    for directory in directories:
        name = printable(directory.name if names[directory.name] == 1 else directory)
        found.append(f"{name} ({len(found) + 1})" if name in found else name)
    return found


def render(file: Path, **content: object) -> None:
    """A page of what is given of name, sentence, facts, strips, chart, their titles, tables, and runs."""
    environment = Environment(loader=PackageLoader("pdistill.report", "."), autoescape=select_autoescape(default=True))
    html = environment.get_template("page.html.jinja").render(version=__version__, **content)
    write_text(file, CONTROL.sub("\N{REPLACEMENT CHARACTER}", html))


def _of_one(directory: Path, run: dict) -> dict[str, object]:
    """The first screen of one run."""
    rows = drawn_once(rows_of(directory))
    metric = run["metric"]
    shown = [(row, directory / row["stage"] / "samples.png") for row in some(rows)]
    strips = [(tables.title(row), number(row.get(metric)), strip(grid)) for row, grid in shown if grid.exists()]
    curves = {**_students_and_teacher(rows, tables.evaluations_of), **_named(curves_of(directory))}
    return {
        "name": run["name"],
        "sentence": run["sentence"],
        "facts": _facts(directory, rows),
        "strips": [(name, value, embedded(picture)) for name, value, picture in strips],
        "strips_title": SAME_NOISE + (f", and its {metric}" if metric else ""),
        "chart": charts.quality(curves, metric, EVALUATIONS) if metric else None,
        "chart_title": f"{metric} against network evaluations; lower is better",
    }


def _of_several(directories: list[Path], runs: list[dict], choices: Choices) -> dict[str, object]:
    """The first screen of several runs: students in one chart, and a table that can be filtered."""
    rows = {str(run["name"]): rows_of(d) for run, d in zip(runs, directories, strict=True)}
    key, apart = _common_metric(rows)
    seeds = headline.only_seeds_differ(choices)
    curves = {name: _curve(filter(_is_student, of_run), key, tables.evaluations_of) for name, of_run in rows.items()}
    last = [(name, headline.last_student(of_run) or of_run[0]) for name, of_run in rows.items()]
    grids = [(name, row, d / row["stage"] / "samples.png") for (name, row), d in zip(last, directories, strict=True)]
    strips = [(name, number(row.get(key)), embedded(strip(grid))) for name, row, grid in some(grids) if grid.exists()]
    return {
        "name": f"{len(runs)} runs",
        "sentence": headline.of_runs(rows, seeds, alike=apart is None),
        "strips": strips,
        "strips_title": "The last student of each run" + (f", and its {key}" if key else ""),
        "chart": charts.quality(curves, key, EVALUATIONS) if key else None,
        "chart_title": "Students of these runs",
        "apart": apart,
        "tables": [_overview(rows, choices)],
    }


def _overview(rows: Mapping[str, list[dict]], choices: Choices) -> Table:
    """A line for each run: what tells it apart, and the metric of each of its stages."""
    keys = list(dict.fromkeys(k for chosen in choices for k in chosen))
    keys = [k for k in keys if len({chosen.get(k, "") for chosen in choices}) > 1]
    metrics = list(dict.fromkeys(key for of_run in rows.values() for key in metric_keys(of_run)))
    columns: dict[str, dict[str, str]] = defaultdict(dict)
    for key in metrics:
        for name, of_run in rows.items():
            for row in of_run:
                heading = tables.title(row) if len(metrics) == 1 else f"{key}, {tables.title(row)}"
                columns[heading][name] = number(row.get(key))
    lines = [
        [name, *(printable(chosen.get(k, "")) for k in keys), *(column.get(name, "") for column in columns.values())]
        for name, chosen in zip(rows, choices, strict=True)
    ]
    title = f"All runs, and their {metrics[0]}" if len(metrics) == 1 else "All runs"
    return Table(title, *tables.filled(["run", *keys, *columns], lines), list(rows))


def _of_run(directory: Path, name: str) -> dict[str, object]:
    """What the page says of one run."""
    rows = rows_of(directory)
    evaluated = evaluation_of(directory)
    metric = next(iter(metric_keys(rows)), None)
    of_evaluation, curves = tables.curves(evaluated)
    losses = losses_of(directory)
    by_seconds = _students_and_teacher(drawn_once(rows), lambda row: finite(row.get("seconds_per_image")))
    grids = [(tables.title(row), directory / row["stage"] / "samples.png") for row in drawn_once(rows)]
    films = [(tables.title(row), frames) for row in rows if len(frames := film_of(directory, row)) > 1]
    neighbours = directory / "neighbours.png"
    return {
        "name": name,
        "sentence": headline.of_run(rows),
        "metric": metric,
        "stages": tables.stages(rows),
        "notes": tables.stage_notes(rows),
        "cost": tables.cost(rows),
        "quality_by_seconds": charts.quality(by_seconds, metric, SECONDS) if metric else None,
        "losses": charts.losses(losses),
        "evaluation": tables.cells(evaluated) if evaluated else None,
        "evaluated": charts.quality(curves, of_evaluation, EVALUATIONS) if of_evaluation else None,
        "grids": [(title, embedded(grid)) for title, grid in grids if grid.exists()],
        "films": [(title, _shown(frames), (title, frames) in some(films, PRINTED_FILMS)) for title, frames in films],
        "neighbours": embedded(neighbours) if neighbours.exists() else None,
        "provenance": tables.provenance(rows),
        "made": {k: str(v) for k, v in run_json(directory).items() if v is not None and not isinstance(v, dict | list)},
        "config": _text(directory / "config.yaml"),
    }


def _shown(frames: list[Frame]) -> list[tuple[str, str, list[str], bool]]:
    """Update, picture and values of each frame, and whether it has room on paper."""
    printed = some(frames, PRINTED_FRAMES)
    return [
        (f"{frame.update:,}", embedded(frame.picture), list(map(number, frame.metrics.values())), frame in printed)
        for frame in frames
    ]


def _facts(directory: Path, rows: list[dict]) -> list[str]:
    """What the run was made of, in a few words."""
    made, measured = run_json(directory), rows[0].get("provenance") or {}
    choices = made.get("choices") if isinstance(made.get("choices"), dict) else {}
    data = choices.get("dataset") or measured.get("reference")  # type: ignore[union-attr]
    kept = [data, *(choices.get(group) for group in ("method", "parameterization", "weighting", "network"))]  # type: ignore[union-attr]
    number_of = measured.get("num_samples")
    samples = [f"{number_of} samples measured"] if number_of else []
    return [printable(word) for word in dict.fromkeys([*filter(None, map(str, filter(None, kept))), *samples])]


def _is_student(row: dict) -> bool:
    return is_student(row["stage"])


def _curve(rows: object, key: str | None, cost: object) -> dict[float, list[float]]:
    """The metric of stages by what they cost, where both are known."""
    found = [(cost(row), finite(row.get(key)) if key else None) for row in rows]  # type: ignore[operator,attr-defined]
    return {float(place): [value] for place, value in found if place and value is not None}


def _students_and_teacher(rows: list[dict], cost: object) -> charts.Curves:
    """A line of the students, and points of what is no student."""
    key = next(iter(metric_keys(rows)), None)
    others = {row["stage"]: _curve([row], key, cost) for row in rows if not _is_student(row)}
    return {"students": _curve(filter(_is_student, rows), key, cost)} | others


def _named(curves: charts.Curves) -> charts.Curves:
    """The teacher's own samplers; the students stand there already."""
    return {name: points for name, points in curves.items() if name.startswith("teacher, ")}


def _common_metric(rows: Mapping[str, list[dict]]) -> tuple[str | None, str | None]:
    """What runs can be compared by; where they were not measured alike, a sentence that says so."""
    if not all(map(metric_keys, rows.values())):
        return None, None
    (first, of_first), *others = rows.items()
    for name, of_run in others:
        if other := comparable(_provenance(of_first), _provenance(of_run)):
            what = "; ".join(other)
            return None, f"{name} was measured otherwise than {first} ({what}): no plot shows them together."
    return metric_keys(of_first)[0], None


def _provenance(rows: list[dict]) -> dict:
    return rows[0].get("provenance") or {}


def _text(file: Path) -> str:
    try:
        return text_of(file)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): restore it, or delete the run") from error
