"""What a finished run shows: the table on the terminal, the comparison sheet, report.html.

`python -m pdistill.report outputs/a outputs/b` writes one page for several runs, outputs/report.html.
"""

import base64
import csv
import io
import json
import sys
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pdistill import curve, figures
from pdistill.errors import UserError

COLUMNS = 12  # seeds on the comparison sheet


def metric_keys(rows: list[dict]) -> list[str]:
    return [k for k in rows[0] if k.startswith("fid")]


def show(directory: Path) -> None:
    """Prints the table of a finished run (steps, quality, time, speed-up over the teacher) and its report's path."""
    rows = json.loads((directory / "summary.json").read_text())
    table = Table(title=str(directory))
    table.add_column("stage")
    for heading in ("steps", *metric_keys(rows), "seconds per image", "speed-up"):
        table.add_column(heading, justify="right")
    for row in cells(rows):
        table.add_row(*row)
    console = Console()
    console.print(table)
    if metric_keys(rows):
        console.print(f"{metric_keys(rows)[0]}: {rows[0]['num_samples']} samples against the training set")
    console.print(f"report: {directory / 'report.html'}", soft_wrap=True)


def cells(rows: list[dict]) -> list[list[str]]:
    """The table in words."""
    teacher = rows[0]["seconds_per_image"]
    return [
        [
            row["stage"],
            str(row["num_steps"]),
            *(f"{row[k]:.3f}" for k in metric_keys(rows)),
            f"{row['seconds_per_image']:.2g}",
            f"{teacher / row['seconds_per_image']:.1f}x",
        ]
        for row in rows
    ]


def comparison_sheet(directory: Path, rows: list[dict], columns: int = COLUMNS) -> None:
    """comparison.png from the stages' grids: a row for each step count, a column for each seed."""
    from PIL import Image

    figure = Figure(figsize=(columns * 0.6 + 1.2, len(rows) * 0.66))
    axes = figure.subplots(len(rows), 1, squeeze=False)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        grid = Image.open(directory / row["stage"] / "samples.png")
        tile = (grid.width - 2) // 8
        strip = Image.new("RGB", (tile * columns + 2, tile + 2), "white")
        for k in range(columns):
            left, top = (k % 8) * tile, (k // 8) * tile
            strip.paste(grid.crop((left, top, left + tile + 2, top + tile + 2)), (k * tile, 0))
        axis.imshow(strip, interpolation="nearest")
        axis.set_xticks([]), axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(title(row, "\n"), rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4, h_pad=0.1)
    figure.savefig(directory / "comparison.png", dpi=110, bbox_inches="tight")


def title(row: dict, separator: str = ", ") -> str:
    """ "teacher, 32 steps", "1 step"."""
    steps = f"{row['num_steps']} step" + "s" * (row["num_steps"] > 1)
    return f"teacher{separator}{steps}" if row["stage"] == "teacher" else steps


def rows_of(directory: Path) -> list[dict]:
    """The rows of the stages that are finished, teacher first."""
    rows = [json.loads(path.read_text()) for path in directory.glob("*/metrics.json")]
    return sorted(rows, key=lambda row: (row["stage"] != "teacher", -row["num_steps"]))


def write(directories: list[Path], file: Path) -> None:
    """A page on finished runs, which needs no other file and no network."""
    runs = [_of_run(directory) for directory in directories]
    environment = Environment(loader=PackageLoader("pdistill", "."), autoescape=select_autoescape(default=True))
    name = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} runs"
    template = environment.get_template("report.html.jinja")
    page = template.render(name=name, runs=runs, together=_together(directories, runs))
    temporary = file.with_name(file.name + ".partial")
    temporary.write_text(page)
    temporary.replace(file)


def _of_run(directory: Path) -> dict[str, object]:
    """What the page says of one run."""
    rows = rows_of(directory)
    evaluation = directory.parent / "evaluations" / f"{directory.name}.json"
    evaluated = json.loads(evaluation.read_text()) if evaluation.exists() else []
    curves, metric = _curves(directory, rows, evaluated)
    losses = _losses(directory)
    made_with = rows[0].get("provenance", {})
    neighbours = directory / "neighbours.png"
    return {
        "name": directory.name,
        "headings": ["stage", "steps", *metric_keys(rows), "seconds per image", "speed-up"],
        "rows": cells(rows),
        "cost": _cost(rows),
        "metric": metric,
        "num_samples": rows[0].get("num_samples"),
        "curve": _svg(curve.draw(curves, metric)) if metric and any(len(p) > 1 for p in curves.values()) else None,
        "losses": _svg(draw_losses(losses)) if losses else None,
        "evaluation": figures.cells(evaluated) if evaluated else None,
        "grids": [(title(row), _base64(directory / row["stage"] / "samples.png")) for row in rows],
        "neighbours": _base64(neighbours) if neighbours.exists() else None,
        "provenance": {k: v for k, v in made_with.items() if k not in ("num_steps", "sampler")},
        "config": (directory / "config.yaml").read_text(),
    }


def _curves(directory: Path, rows: list[dict], evaluated: list[dict]) -> tuple[curve.Curves, str | None]:
    """The evaluation's, if there is one, for its intervals and baselines; else what the run measured itself."""
    if evaluated:
        metric, curves = figures.curves(evaluated)
        return curves, metric
    metrics = metric_keys(rows)
    return (curve.read(directory), metrics[0]) if metrics else ({}, None)


def _together(directories: list[Path], runs: list[dict]) -> str | None:
    """The students of several runs in one figure, where they were measured alike."""
    rows = [rows_of(directory) for directory in directories]
    if len(runs) < 2 or not all(map(metric_keys, rows)):
        return None
    if any(figures.comparable(rows[0][0].get("provenance", {}), r[0].get("provenance", {})) for r in rows[1:]):
        return None
    key = metric_keys(rows[0])[0]
    curves = {
        run["name"]: {row["num_steps"]: [row[key]] for row in of_run if row["stage"] != "teacher"}
        for run, of_run in zip(runs, rows, strict=True)
    }
    return _svg(curve.draw(curves, key)) if any(curves.values()) else None


def _cost(rows: list[dict]) -> list[list[str]]:
    """Stage, updates, images, minutes, and kJ where the GPU tells."""
    known = [row for row in rows if "training_seconds" in row]
    return [
        [
            row["stage"],
            str(row["updates"]),
            str(row["training_images"]),
            f"{row['training_seconds'] / 60:.1f}",
            "" if row.get("joules") is None else f"{row['joules'] / 1000:.1f}",
        ]
        for row in known
    ]


def _losses(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Of each stage (update, loss), from what logger=csv wrote, restarts included; empty with another logger."""
    losses: dict[str, dict[int, float]] = {}
    versions = sorted((directory / "csv").glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name[8:]))
    for path in versions:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if key and key.endswith("/loss") and value:
                        losses.setdefault(key.removesuffix("/loss"), {})[int(row["step"])] = float(value)
    return {stage: sorted(points.items()) for stage, points in losses.items()}


def draw_losses(losses: dict[str, list[tuple[int, float]]]) -> Figure:
    """One line for each stage, logarithmic."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for stage, points in losses.items():
        axis.plot(*zip(*points, strict=True), label=stage.replace("_", " "), lw=1)
    axis.set(yscale="log", xlabel="update", ylabel="loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", ncols=2)
    return figure


def _svg(figure: Figure) -> str:
    """Inline, black and white taken as the page's colours, words as text."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pdistill"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor").replace("#ffffff", "none")


def _base64(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


if __name__ == "__main__":
    try:
        if not sys.argv[1:] or not all((Path(d) / "teacher" / "metrics.json").exists() for d in sys.argv[1:]):
            raise UserError("give directories outputs/<name>, in each of which a teacher/ at least is finished")
        write([Path(d) for d in sys.argv[1:]], Path("outputs/report.html"))
        print("wrote outputs/report.html")
    except UserError as error:
        sys.exit(f"error: {error}")
