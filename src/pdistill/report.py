"""What a finished run shows: the comparison sheet, the table on the terminal, report.html."""

import base64
import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from rich.console import Console
from rich.table import Table

from pdistill import curve

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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    figure, axes = plt.subplots(len(rows), 1, figsize=(columns * 0.6 + 1.2, len(rows) * 0.66), squeeze=False)
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
        label = f"{row['num_steps']} step" + "s" * (row["num_steps"] > 1)
        axis.set_ylabel(
            f"teacher\n{label}" if row["stage"] == "teacher" else label, rotation=0, ha="right", va="center"
        )
    figure.tight_layout(pad=0.4, h_pad=0.1)
    figure.savefig(directory / "comparison.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def write_report(directory: Path, rows: list[dict]) -> None:
    """report.html, which needs no other file and no network."""
    picture = directory / "curve.png"
    if (directory / "teacher" / "curve.json").exists():
        curve.plot(curve.read(directory), metric_keys(rows)[0], picture)
    environment = Environment(loader=PackageLoader("pdistill", "."), autoescape=select_autoescape(default=True))
    page = environment.get_template("report.html.jinja").render(
        name=directory.name,
        headings=["stage", "steps", *metric_keys(rows), "seconds per image", "speed-up"],
        rows=cells(rows),
        metrics=metric_keys(rows),
        num_samples=rows[0].get("num_samples"),
        comparison=base64.b64encode((directory / "comparison.png").read_bytes()).decode(),
        curve=base64.b64encode(picture.read_bytes()).decode() if picture.exists() else None,
        config=(directory / "config.yaml").read_text(),
    )
    temporary = directory / "report.html.partial"
    temporary.write_text(page)
    temporary.replace(directory / "report.html")
