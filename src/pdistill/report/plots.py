"""Quality against step count, like the paper's figure 4: students, and the teacher by its own samplers."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from pdistill.files import write_json

STUDENTS = "distilled"

Curves = dict[str, dict[int, list[float]]]  # of each sampler: the figures at each step count, one for each run


def measure_teacher(
    path: Path, steps: Sequence[int], samplers: Sequence[str], measure: Callable[[int, str], float], writes: bool
) -> None:
    """Fills the JSON at `path`, sampler -> step count -> figure, point by point; what is there is kept.

    With several devices all ranks call `measure`, and one `writes`.
    """
    points = json.loads(path.read_text()) if path.exists() else {}
    for sampler in samplers:
        for num_steps in steps:
            of_sampler = points.setdefault(sampler, {})
            if str(num_steps) not in of_sampler:
                of_sampler[str(num_steps)] = measure(num_steps, sampler)
                if writes:
                    write_json(path, points)


def read(*runs: Path) -> Curves:
    """The curves of runs of one kind, each with another seed, from their metrics.json and teacher/curve.json."""
    curves: Curves = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for path in sorted(run.glob("steps-*/metrics.json")):
            row = json.loads(path.read_text())
            curves[STUDENTS][row["num_steps"]] += [v for k, v in row.items() if k.startswith("fid")]
        for sampler, points in teacher_points(run).items():
            for num_steps, value in points.items():
                curves[f"teacher, {sampler}"][int(num_steps)].append(value)
    return curves


def teacher_points(run: Path) -> dict[str, dict[str, float]]:
    """What `measure_teacher` wrote: sampler -> step count -> figure; empty if it did not."""
    path = run / "teacher" / "curve.json"
    return json.loads(path.read_text()) if path.exists() else {}


def table(curves: Curves) -> list[str]:
    """Markdown: a row for each step count, mean and standard deviation over runs.

    The ratio is each run's student over its own teacher's DDIM at the most steps that were measured.
    """
    ddim = curves.get("teacher, ddim")
    reference = ddim[max(ddim)] if ddim else None
    lines = ["| steps | " + " | ".join([*curves, "distilled / teacher"]) + " |", "|" + " ---: |" * (len(curves) + 2)]
    for num_steps in sorted({n for points in curves.values() for n in points}):
        cells = [mean_and_spread(points.get(num_steps)) for points in curves.values()]
        students = curves[STUDENTS].get(num_steps)
        ratios = [a / b for a, b in zip(students, reference, strict=True)] if students and reference else None
        lines.append(f"| {num_steps} | " + " | ".join([*cells, mean_and_spread(ratios)]) + " |")
    return lines


def mean_and_spread(values: Sequence[float] | None) -> str:
    """ "2.107 ± 0.031": mean and sample standard deviation, the latter where there is more than one value."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def draw(curves: Curves, metric: str) -> Figure:
    """Means as lines, the range over runs, or the interval, as bands, both axes logarithmic."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for (name, points), marker in zip(curves.items(), cycle("osD^vPX<>"), strict=False):
        steps = sorted(points)
        (line,) = axis.plot(steps, [statistics.mean(points[n]) for n in steps], marker=marker, ms=4, label=name)
        low, high = ([f(points[n]) for n in steps] for f in (min, max))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({n for points in curves.values() for n in points})
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.set_xlabel("network evaluations per image")
    axis.set_ylabel(metric)
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside upper center", ncols=min(3, len(curves)), fontsize="small", frameon=False)
    return figure


def plot(curves: Curves, metric: str, path: Path) -> None:
    """`draw` as a PNG."""
    temporary = path.with_name(f".{path.name}")
    draw(curves, metric).savefig(temporary, dpi=120)
    temporary.replace(path)
