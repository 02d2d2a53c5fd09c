"""What a finished run looks like: report.html, and the comparison sheet."""

import base64
import re
from collections import Counter
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure
from PIL import Image

from pdistill.errors import UserError, first_line, printable
from pdistill.files import write_text
from pdistill.metrics.provenance import comparable
from pdistill.reading import regular, text_of
from pdistill.report import plots, tables
from pdistill.report.runs import (
    Frame,
    check,
    curves_of,
    evaluation_of,
    film_of,
    finite,
    losses_of,
    metric_keys,
    rows_of,
    run_json,
)
from pdistill.steps import is_student

COLUMNS = 12  # seeds on the comparison sheet
PER_LINE = 8  # of the 64 pictures of samples.png, with a border of two pixels
BORDER = 2
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # characters that no page needs, and a terminal would obey
MOST_PICTURE = 64 * 1024**2  # bytes of one on the page


def comparison_sheet(directory: Path, rows: list[dict], columns: int = COLUMNS) -> None:
    """comparison.png from the stages' grids: a row for each step count, a column for each seed."""
    grids = [(row, directory / row["stage"] / "samples.png") for row in rows]
    strips = [(row, _strip(grid, columns)) for row, grid in grids if grid.exists()]
    if not strips:
        return
    figure = Figure(figsize=(columns * 0.6 + 1.2, len(strips) * 0.66))
    axes = figure.subplots(len(strips), 1, squeeze=False)
    for axis, (row, strip) in zip(axes[:, 0], strips, strict=True):
        axis.imshow(strip, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(tables.title(row, "\n"), rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4, h_pad=0.1)
    plots.save(figure, directory / "comparison.png", dpi=110, tight=True)


def _strip(grid: Path, columns: int) -> Image.Image:
    """The first pictures of a grid side by side."""
    try:
        regular(grid)
        with Image.open(grid, formats=["PNG"]) as picture:
            width, height = ((side - BORDER) // PER_LINE for side in picture.size)
            strip = Image.new("RGB", (width * columns + BORDER, height + BORDER), "white")
            for k in range(columns):
                left, top = (k % PER_LINE) * width, (k // PER_LINE) * height
                strip.paste(picture.crop((left, top, left + width + BORDER, top + height + BORDER)), (k * width, 0))
        return strip
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{grid} is damaged ({first_line(error)}): delete it and its stage's metrics.json") from error


def write(directories: list[Path], file: Path) -> None:
    """A page on runs, which needs no other file and no network.

    Raises UserError for a directory that is no run, or has no finished stage, and for damaged files.
    """
    for directory in directories:
        check(directory)
    names = Counter(directory.name for directory in directories)
    runs = [_of_run(d, printable(d.name if names[d.name] == 1 else d)) for d in directories]
    together, apart = _together(directories, [str(run["name"]) for run in runs])
    environment = Environment(loader=PackageLoader("pdistill.report", "."), autoescape=select_autoescape(default=True))
    name = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} runs"
    template = environment.get_template("page.html.jinja")
    html = template.render(name=name, runs=runs, together=together, apart=apart)
    write_text(file, CONTROL.sub("\N{REPLACEMENT CHARACTER}", html))


def _of_run(directory: Path, name: str) -> dict[str, object]:
    """What the page says of one run."""
    rows = rows_of(directory)
    evaluated = evaluation_of(directory)
    metric, curves = tables.curves(evaluated)
    if metric is None:  # no evaluation, which has intervals and baselines: what the run measured itself
        metric, curves = next(iter(metric_keys(rows)), None), curves_of(directory)
    several = any(len(points) > 1 for points in plots.drawable(curves).values())
    losses = losses_of(directory)
    grids = [(tables.title(row), directory / row["stage"] / "samples.png") for row in rows]
    films = [(tables.title(row), film_of(directory, row)) for row in rows]
    neighbours = directory / "neighbours.png"
    return {
        "name": name,
        "stages": tables.stages(rows),
        "notes": tables.stage_notes(rows),
        "cost": tables.cost(rows),
        "curve": plots.svg(plots.draw(curves, metric)) if metric and several else None,
        "losses": plots.svg(plots.draw_losses(losses)) if losses else None,
        "evaluation": tables.cells(evaluated) if evaluated else None,
        "grids": [(title, _base64(grid)) for title, grid in grids if grid.exists()],
        "films": [(title, [_shown(frame) for frame in frames]) for title, frames in films if len(frames) > 1],
        "film_metric": next(iter(metric_keys(rows)), None),
        "neighbours": _base64(neighbours) if neighbours.exists() else None,
        "provenance": tables.provenance(rows),
        "made": {k: str(v) for k, v in run_json(directory).items() if v is not None and not isinstance(v, dict | list)},
        "config": _text(directory / "config.yaml"),
    }


def _shown(frame: Frame) -> tuple[str, str, list[str]]:
    """Update, picture and values of a frame, for the template."""
    return f"{frame.update:,}", _base64(frame.picture), [tables.words(value) for value in frame.metrics.values()]


def _together(directories: list[Path], names: list[str]) -> tuple[str | None, str | None]:
    """The students of several runs in one plot; where they were not measured alike, a sentence that says so."""
    rows = dict(zip(names, map(rows_of, directories), strict=True))
    if len(rows) < 2 or not all(map(metric_keys, rows.values())):
        return None, None
    (first, of_first), *others = rows.items()
    for name, of_run in others:
        if other := comparable(_provenance(of_first), _provenance(of_run)):
            return (
                None,
                f"{name} was measured otherwise than {first} ({'; '.join(other)}): no plot shows them together.",
            )
    key = metric_keys(of_first)[0]
    curves = {name: _students(of_run, key) for name, of_run in rows.items()}
    return (plots.svg(plots.draw(curves, key)) if plots.drawable(curves) else None), None


def _students(rows: list[dict], key: str) -> dict[int, list[float]]:
    values = {row["num_steps"]: finite(row.get(key)) for row in rows if is_student(row["stage"])}
    return {n: [value] for n, value in values.items() if value is not None}


def _provenance(rows: list[dict]) -> dict:
    return rows[0].get("provenance") or {}


def _text(file: Path) -> str:
    try:
        return text_of(file)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): restore it, or delete the run") from error


def _base64(picture: Path) -> str:
    if regular(picture) > MOST_PICTURE:
        raise UserError(f"{picture} has more than {MOST_PICTURE:,} bytes, too many for a page: delete it")
    return base64.b64encode(picture.read_bytes()).decode()
