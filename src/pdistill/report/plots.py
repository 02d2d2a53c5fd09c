"""Curves and the comparison sheet, by matplotlib. Values not finite, or not positive on a log axis, are left out."""

import math
import statistics
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import LogFormatter, MaxNLocator, NullLocator, ScalarFormatter

from pdistill.errors import printable
from pdistill.files import whole
from pdistill.metrics.curve import Curves
from pdistill.report import tables
from pdistill.report.pictures import strip
from pdistill.report.runs import drawn_once

LEGEND = 90  # characters that fit beside each other
COLUMNS = 12  # seeds on the comparison sheet
MOST_TICKS, MOST_LINES = 30, 60  # in one plot
NARROW = 5  # the highest value over the lowest, up to which ticks are evenly spaced numbers


def drawable(curves: Curves) -> Curves:
    """The curves' positive and finite values; what has none is left out."""
    found: Curves = {}
    for name, points in curves.items():
        kept = {n: [v for v in values if v is not None and math.isfinite(v) and v > 0] for n, values in points.items()}
        if any(kept.values()):
            found[name] = {n: values for n, values in kept.items() if values}
    return found


def draw(curves: Curves, metric: str) -> Figure:
    """Quality against step count, like the paper's figure 4: means as lines, the range over runs, or the interval, as
    bands, both axes logarithmic."""
    curves = drawable(curves)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for (name, points), marker in zip(list(curves.items())[:MOST_LINES], cycle("osD^vPX<>"), strict=False):
        steps = sorted(points)
        means = [statistics.mean(points[n]) for n in steps]
        (line,) = axis.plot(steps, means, marker=marker, ms=4, label=_label(name))
        low, high = ([f(points[n]) for n in steps] for f in (min, max))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log" if curves else "linear")
    values = [v for points in curves.values() for of_steps in points.values() for v in of_steps if v]
    if values and max(values) > NARROW * min(values):
        axis.yaxis.set_major_formatter(LogFormatter())  # 4, not 4 x 10^0
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    elif values:  # powers of ten and their multiples are too far apart
        axis.yaxis.set_major_locator(MaxNLocator(6))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_locator(NullLocator())
    ticks = sorted({n for points in curves.values() for n in points})
    ticks = ticks[:: max(1, len(ticks) // MOST_TICKS)]
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.set_xlabel("network evaluations per image")
    axis.set_ylabel(_label(metric), parse_math=False)
    axis.grid(alpha=0.3, which="both")
    if curves:
        columns = max(1, min(3, len(curves), LEGEND // (max(len(_label(name)) for name in curves) + 6)))
        _as_it_stands(figure.legend(loc="outside upper center", ncols=columns, fontsize="small", frameon=False))
    return figure


def _label(name: str) -> str:
    """What stands in a legend of a name that anybody may have given; matplotlib hides what begins with "_"."""
    text = printable(name)
    return (text if len(text) <= LEGEND else f"{text[:LEGEND]}...").lstrip("_") or "?"


def _as_it_stands(legend: Legend) -> None:
    """No formulas between dollars."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def save(figure: Figure, path: Path, dpi: int = 120, tight: bool = False) -> None:
    """The figure as a PNG, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight" if tight else None)


def plot(curves: Curves, metric: str, path: Path) -> None:
    """`draw` as a PNG."""
    save(draw(curves, metric), path)


def comparison_sheet(directory: Path, rows: list[dict], columns: int = COLUMNS) -> None:
    """comparison.png from the stages' grids: a row for each step count, a column for each seed."""
    grids = [(row, directory / row["stage"] / "samples.png") for row in drawn_once(rows)]
    strips = [(row, strip(grid, columns)) for row, grid in grids if grid.exists()]
    if not strips:
        return
    figure = Figure(figsize=(columns * 0.6 + 1.2, len(strips) * 0.66))
    axes = figure.subplots(len(strips), 1, squeeze=False)
    for axis, (row, pictures) in zip(axes[:, 0], strips, strict=True):
        axis.imshow(pictures, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(tables.title(row, "\n"), rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4, h_pad=0.1)
    save(figure, directory / "comparison.png", dpi=110, tight=True)
