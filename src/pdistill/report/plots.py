"""Curves and losses as matplotlib figures. Values that are not finite, or not positive on a log axis, are left out."""

import io
import math
import statistics
from itertools import cycle
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from pdistill.files import whole
from pdistill.metrics.curve import Curves

LEGEND = 90  # characters that fit beside each other


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
    for (name, points), marker in zip(curves.items(), cycle("osD^vPX<>"), strict=False):
        steps = sorted(points)
        (line,) = axis.plot(steps, [statistics.mean(points[n]) for n in steps], marker=marker, ms=4, label=name)
        low, high = ([f(points[n]) for n in steps] for f in (min, max))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log" if curves else "linear")
    if curves:
        axis.yaxis.set_major_formatter(LogFormatter())  # 4, not 4 x 10^0
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    ticks = sorted({n for points in curves.values() for n in points})
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.set_xlabel("network evaluations per image")
    axis.set_ylabel(metric)
    axis.grid(alpha=0.3, which="both")
    if curves:
        columns = max(1, min(3, len(curves), LEGEND // (max(map(len, curves)) + 6)))
        figure.legend(loc="outside upper center", ncols=columns, fontsize="small", frameon=False)
    return figure


def draw_losses(losses: dict[str, list[tuple[int, float]]]) -> Figure:
    """One line (update, loss) for each stage, logarithmic."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for stage, points in losses.items():
        updates, values = [n for n, v in points if v > 0], [v for _, v in points if v > 0]
        axis.plot(updates, values, label=stage.replace("_", " "), lw=1, marker="." if len(updates) == 1 else "")
    axis.set(yscale="log", xlabel="update", ylabel="loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", ncols=2)
    return figure


def save(figure: Figure, path: Path, dpi: int = 120, tight: bool = False) -> None:
    """The figure as a PNG, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight" if tight else None)


def plot(curves: Curves, metric: str, path: Path) -> None:
    """`draw` as a PNG."""
    save(draw(curves, metric), path)


def svg(figure: Figure) -> str:
    """The figure to stand inside of a page: black and white taken as the page's colours, words as text."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pdistill"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor").replace("#ffffff", "none")
