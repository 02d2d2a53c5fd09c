"""Charts of the page as geometry, which page_parts.html.jinja draws as SVG: it needs no library and no network.

Values that are not finite, or not positive on a logarithmic axis, are left out.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdistill.errors import printable
from pdistill.report.rounding import mean_and_spread, number

WIDTH, HEIGHT = 560, 340  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 58, 542, 16, 286  # of its frame
MOST_LINES, MOST_POINTS = 60, 300  # in one chart, of one line
NARROW = 44  # units between two ticks of the lower axis
COLORS = 8  # that page.css.jinja has
LONGEST = 90  # characters of a name
SMALLEST, LARGEST = 1e-99, 1e99  # values

Curves = Mapping[str, Mapping[Any, Sequence[float]]]  # of each line: x -> one value, or several whose range is shown
Tick = tuple[float, str]


@dataclass(frozen=True)
class Axis:
    """From numbers to units of the chart, from `start` to `end`."""

    title: str
    low: float
    high: float
    start: float
    end: float
    log: bool = True

    @classmethod
    def over(cls, title: str, values: Sequence[float], place: tuple[float, float], log: bool) -> "Axis":
        """An axis on which all of the values have room."""
        low, high = min(values), max(values)
        if log:
            room = max((math.log(high) - math.log(low)) * 0.06, 0.05)
            return cls(title, math.exp(math.log(low) - room), math.exp(math.log(high) + room), *place)
        room = max((high - low) * 0.03, abs(high) * 0.01, 1e-9)
        return cls(title, low - room, high + room, *place, log=False)

    def at(self, value: float) -> float:
        """Where a number lies."""
        low, high, here = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (here - low) / (high - low), 1)

    @property
    def ticks(self) -> list[Tick]:
        """Round numbers: of a logarithmic axis 1, 2 and 5 times powers of ten, as far as there is room."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1) if self.log else ()
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [factor * 10.0**power for power in powers for factor in factors]
            found = [value for value in found if self.low <= value <= self.high]
            if 3 <= len(found) <= 7:
                return [(self.at(value), _short(value)) for value in found]
        if self.log and len(powers) > 4:
            found = [10.0**power for power in powers if self.low <= 10.0**power <= self.high]
            return [(self.at(value), _short(value)) for value in found[:: -(-len(found) // 6)]]
        step = _round_step((self.high - self.low) / 4)
        found = [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self.at(value), _short(value)) for value in found if value > 0 or not self.log]


def _round_step(width: float) -> float:
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)


def _short(value: float) -> str:
    return f"{value:,.6g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.0e}"


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    color: int
    path: str
    band: str
    points: list[tuple[float, float, str, str]] = field(default_factory=list)
    """Of each point x and y in units, what is said of it, and its value alone."""


@dataclass(frozen=True)
class Chart:
    """What the template draws."""

    x: Axis
    y: Axis
    x_ticks: list[Tick]
    lines: list[Line]
    label: str
    numbers: tuple[list[str], list[list[str]]] | None
    """The same as a table: headings and lines."""


def quality(curves: Curves, metric: str, cost: str) -> Chart | None:
    """A metric against what it costs, both logarithmic, with a mark for each point; None where there is no point."""
    found = _drawable(curves)
    if not found:
        return None
    costs = sorted({x for points in found.values() for x in points})
    x, y = _axes(found, (cost, metric), log=True)
    ticks = [(x.at(value), _short(value)) for value in costs] if all(v == int(v) for v in costs) else x.ticks
    lines = [_line(k, name, points, x, y) for k, (name, points) in enumerate(found.items())]
    rows = [
        [_short(float(number(c, 3))), *(mean_and_spread(points.get(c)) for points in found.values())] for c in costs
    ]
    label = (
        f"{metric} against {cost}: {', '.join(line.name for line in lines[:8])}. The numbers are in the table below."
    )
    return Chart(x, y, _apart(ticks), lines, label, ([cost, *(line.name for line in lines)], rows))


def losses(of_stages: Mapping[str, Sequence[tuple[int, float]]]) -> Chart | None:
    """The loss of each stage against its updates, logarithmic."""
    curves = {stage.replace("_", " "): {float(n): [v] for n, v in points} for stage, points in of_stages.items()}
    found = {name: _thinned(points) for name, points in _drawable(curves, anywhere=True).items()}
    if not found:
        return None
    x, y = _axes(found, ("update", "loss"), log=False)
    lines = [_line(k, name, points, x, y) for k, (name, points) in enumerate(found.items())]
    ends = ", ".join(
        f"{name} ends at {mean_and_spread(points[max(points)])}" for name, points in list(found.items())[:8]
    )
    return Chart(x, y, x.ticks, lines, f"loss against updates: {printable(ends)}", None)


def _drawable(curves: Curves, anywhere: bool = False) -> dict[str, dict[float, list[float]]]:
    """Positive and finite values, at positive places (`anywhere`: at any); what has none is left out."""
    found = {}
    for name, points in curves.items():
        kept = {float(x): _positive(values) for x, values in sorted(points.items()) if anywhere or x > 0}
        if any(kept.values()):
            found[_name(name)] = {x: values for x, values in kept.items() if values}
    return dict(list(found.items())[:MOST_LINES])


def _positive(values: Sequence[float | None]) -> list[float]:
    """The values of a point; where some of them are not positive, the one in their middle, if that is."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    middle = known if all(v > 0 for v in known) else [statistics.median(known)]
    return [v for v in middle if SMALLEST <= v <= LARGEST]


def _thinned(points: dict[float, list[float]]) -> dict[float, list[float]]:
    """At most so many points, the last among them."""
    kept = list(points.items())[:: -(-len(points) // MOST_POINTS)]
    return dict(kept) | dict([max(points.items())])


def _axes(found: Curves, titles: tuple[str, str], log: bool) -> tuple[Axis, Axis]:
    costs = [x for points in found.values() for x in points]
    values = [v for points in found.values() for of_point in points.values() for v in of_point]
    return (
        Axis.over(titles[0], costs, (LEFT, RIGHT), log),
        Axis.over(printable(titles[1]), values, (BOTTOM, TOP), True),
    )


def _line(place: int, name: str, points: Mapping[float, Sequence[float]], x: Axis, y: Axis) -> Line:
    means = {cost: statistics.mean(values) for cost, values in points.items()}
    path = "M" + "L".join(f"{x.at(cost)} {y.at(value)}" for cost, value in means.items())
    if len(means) == 1:  # a level to compare with
        path = f"M{LEFT} {y.at(*means.values())}H{RIGHT}"
    edges = [(x.at(cost), y.at(min(values)), y.at(max(values))) for cost, values in points.items()]
    several = any(low != high for _, low, high in edges) and len(edges) > 1
    around = [f"{a} {low}" for a, low, _ in edges] + [f"{a} {high}" for a, _, high in reversed(edges)]
    said = {cost: mean_and_spread(values) for cost, values in points.items()}
    marks = [(x.at(c), y.at(v), f"{name}, {_short(c)} {x.title}: {said[c]}", number(v)) for c, v in means.items()]
    return Line(name, place % COLORS, path, f"M{'L'.join(around)}Z" if several else "", marks)


def _name(name: str) -> str:
    text = printable(name)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _apart(ticks: list[Tick]) -> list[Tick]:
    """The ticks that have room beside each other, the first first."""
    kept: list[Tick] = []
    for place, text in ticks:
        if not kept or place - kept[-1][0] >= NARROW * max(1, len(text) / 5):
            kept.append((place, text))
    return kept
