"""Rows to words: the table of a run's stages, of an evaluation, of a sweep.

A table is headings and lines of cells, all of them text. What is missing or not finite is an empty cell, and a metric
without any value has no column. A row of an evaluation holds metrics, `<metric>_std`, and under "provenance" what
they were measured with.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pdistill.errors import printable
from pdistill.metrics.curve import Curves
from pdistill.metrics.provenance import comparable, evaluations
from pdistill.report.rounding import mean_and_spread, number, supported, with_spread
from pdistill.report.runs import KEY_OF_WEIGHTS, finite, metric_keys
from pdistill.steps import is_student

if TYPE_CHECKING:
    from rich.table import Table

REAL = "real images"  # the label of the row that compares two halves of the reference
BUSY = 0.2  # relative spread of timings above which the table says so
SPREAD = "seconds_per_image_spread"
OF_THE_REFERENCE = ("extractor", "extractor_fingerprint", "reference_fingerprint")

Words = tuple[list[str], list[list[str]]]  # headings, and lines of as many cells


def words(value: object, format_spec: str = ".4g", suffix: str = "") -> str:
    """A finite number in words, "" for anything else."""
    number = finite(value)
    return "" if number is None else f"{number:{format_spec}}{suffix}"


def plain(text: object) -> str:
    """Text of unknown origin for Markdown: in one line, and neither HTML, a link nor a picture."""
    return printable(text).replace("<", "&lt;").replace("](", "]\\(").replace("|", "\\|")


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, columns of numbers to the right."""
    columns = zip(*lines, strict=True) if lines else ([] for _ in headings)
    numeric = [all(c.strip("*+-")[:1].isdigit() for c in column if c) and any(column) for column in columns]
    rule = ["---:" if right else "---" for right in numeric]
    return ["| " + " | ".join(map(plain, row)) + " |" for row in (headings, rule, *lines)]


def terminal(headings: Sequence[str], lines: Sequence[Sequence[str]], title: str) -> "Table":
    """The table for a terminal, to be printed by a `rich.console.Console`."""
    from rich.table import Table
    from rich.text import Text

    def text(words: str) -> Text:
        return Text(printable(words))

    table = Table(title=text(title))
    for heading in headings:
        table.add_column(text(heading), justify="left" if heading == headings[0] else "right", no_wrap=True)
    for line in lines:
        table.add_row(*map(text, line))
    return table


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns without a frame, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]


def filled(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Words:
    """The table without the columns that are empty."""
    known = [k for k in range(len(headings)) if not lines or any(line[k] for line in lines)]
    return [headings[k] for k in known], [[line[k] for k in known] for line in lines]


# ---- the stages of a run


def title(row: dict, separator: str = ", ") -> str:
    """ "teacher, 32 steps", "1 step"."""
    return steps_of(row) if is_student(row["stage"]) else f"{row['stage']}{separator}{steps_of(row)}"


def steps_of(row: dict) -> str:
    """ "1 step", "32 steps"."""
    return f"{row['num_steps']} step{'s' * (row['num_steps'] > 1)}"


def evaluations_of(row: dict) -> int:
    """Network evaluations of one of a stage's samples."""
    return evaluations((row.get("provenance") or {}) | {"num_steps": row["num_steps"]}) or row["num_steps"]


def speed_up(teacher: dict, row: dict) -> str:
    """How many times faster a stage samples than the teacher, as exactly as their timings allow; "" if not timed."""
    ours, theirs = (finite(r.get("seconds_per_image")) for r in (row, teacher))
    if not ours or not theirs:
        return ""
    spread = max(finite(r.get(SPREAD)) or 0.0 for r in (row, teacher)) if row is not teacher else 0.0
    return supported(theirs / ours, spread * theirs / ours, 2)


def stages(rows: list[dict]) -> Words:
    """The stages of a run: steps, metrics, seconds per image, and the speed-up over the teacher."""
    metrics = metric_keys(rows)
    lines = []
    for row in rows:
        factor = speed_up(rows[0], row)
        times = [number(row.get("seconds_per_image"), 2), factor and f"{factor}x"]
        lines.append([row["stage"], str(row["num_steps"]), *(number(row.get(k)) for k in metrics), *times])
    return filled(["stage", "steps", *metrics, "seconds per image", "speed-up"], lines)


def stage_notes(rows: list[dict]) -> list[str]:
    """Sentences below the table of stages: how time was measured, and how the metric was."""
    notes = []
    if any(finite(row.get("seconds_per_image")) for row in rows):
        in_turns = any(SPREAD in row for row in rows)
        way = "the median over rounds in which all stages took turns" if in_turns else "the fastest of three rounds"
        notes.append(f"Seconds per image: batches of 64, {way}, on this run's machine.")
    spread = max((finite(row.get(SPREAD)) or 0.0 for row in rows), default=0.0)
    if spread > BUSY:
        notes.append(f"Timings vary by {spread:.0%}: the machine was busy.".replace("%", " %"))
    if any("timed_steps" in row for row in rows):
        notes.append("Long samplers were timed for a part of their steps, and the seconds scaled up.")
    number = next((row["num_samples"] for row in rows if row.get("num_samples")), None)
    if metric_keys(rows) and number:
        reference = str((rows[0].get("provenance") or {}).get("reference", ""))
        none = " of the teacher" in reference  # dataset=none
        against = "the samples of the teacher, not real images" if none else "the training set"
        notes.append(f"{metric_keys(rows)[0]}: {number} samples against {against}; lower is better.")
    return notes


def cost(rows: list[dict]) -> Words:
    """Of what was trained: updates, learning rate, images, network passes, minutes and, where the GPU tells, kJ."""
    lines = [
        [
            row["stage"],
            words(row.get("updates"), ".0f"),
            words(row.get("learning_rate"), "g"),
            words(row.get("training_images"), ".0f"),
            words(row.get("network_passes"), ".0f"),
            number(row["training_seconds"] / 60, 2),
            number((finite(row.get("joules")) or 0.0) / 1000 or None, 2),
        ]
        for row in rows
        if finite(row.get("training_seconds")) is not None
    ]
    return filled(["stage", "updates", "learning rate", "images", "network passes", "minutes", "kJ"], lines)


def provenance(rows: list[dict]) -> dict[str, str]:
    """What the metrics of a run's stages were measured with, key by key; what differs, stage by stage."""
    made_with = {row["stage"]: _flat(row["provenance"]) for row in rows if row.get("provenance")}
    found = {}
    for key in dict.fromkeys(k for of_stage in made_with.values() for k in of_stage if k != "num_steps"):
        values = {stage: of_stage.get(key, "") for stage, of_stage in made_with.items()}
        same = len(set(values.values())) == 1
        found[key] = next(iter(values.values())) if same else ", ".join(f"{s}: {v}" for s, v in values.items())
    return found


def _flat(content: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


# ---- an evaluation


def cells(rows: list[dict]) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, lines and notes of an evaluation; rows that are no comparison with the first sampled one carry a mark,
    and so do rows that do not say what weights were measured."""
    keys = dict.fromkeys(
        k for row in rows for k in row if not k.endswith("_std") and k not in ("provenance", "seconds")
    )
    metrics = [k for k in keys if any(finite(row.get(k)) is not None for row in rows)]
    sampled = [row["provenance"] for row in rows if row["provenance"].get("num_steps")]
    twice = any(evaluations(made_with) != made_with["num_steps"] for made_with in sampled)
    lines, marks = [], {}
    for row in sorted(rows, key=lambda row: row["provenance"]["label"] == REAL):
        made_with, label = row["provenance"], row["provenance"]["label"]
        for reason in _reservations(sampled[0], made_with) if sampled else []:
            label += marks.setdefault(reason, "†" * (len(marks) + 1))
        values = [with_spread(row.get(m), row.get(f"{m}_std")) for m in metrics]
        cost = [str(made_with.get("num_steps") or ""), *([str(evaluations(made_with) or "")] if twice else [])]
        lines.append([label, *cost, str(made_with.get("num_samples", "")), *values])
    headings = ["samples of", "steps", *(["evaluations"] if twice else []), "number", *metrics]
    return *filled(headings, lines), [f"{mark} {reason}" for reason, mark in marks.items()]


def curves(rows: list[dict]) -> tuple[str | None, Curves]:
    """The name of the FID, and its values by network evaluations, of the rows that are a comparison with the first
    sampled one.

    With a standard deviation the values are three: the metric less that, itself, and with that added.
    """
    sampled = [row for row in rows if row["provenance"].get("num_steps")]
    metric = next(iter(metric_keys(sampled)), None)
    found: Curves = {}
    for row in sampled:
        made_with, value = row["provenance"], finite(row.get(metric)) if metric else None
        if value is None or comparable(sampled[0]["provenance"], made_with):
            continue
        spread = finite(row.get(f"{metric}_std")) or 0.0
        label = made_with["label"] + (", weights unknown" if _weights_unknown(made_with) else "")
        values = [value - spread, value, value + spread] if spread else [value]
        found.setdefault(label, {})[evaluations(made_with) or 0] = values
    return metric, found


def _reservations(first: dict, made_with: dict) -> list[str]:
    """What is to be said of a row beside the first one."""
    if made_with["label"] == REAL:  # nothing was sampled: only the extractor and the reference matter
        ours, theirs = ({k: p.get(k) for k in OF_THE_REFERENCE} for p in (first, made_with))
        other = comparable(dict(ours), dict(theirs))
    else:
        other = comparable(first, made_with)
    reasons = [f"measured otherwise: {'; '.join(other)}"] if other else []
    return (
        [*reasons, "weights unknown: measured before their hash was kept"] if _weights_unknown(made_with) else reasons
    )


def _weights_unknown(made_with: dict) -> bool:
    return made_with.get("denoiser") is not None and not made_with.get(KEY_OF_WEIGHTS)


# ---- runs over seeds


def curve_table(found: Curves, ratios: Mapping[int, Sequence[float]]) -> Words:
    """A row for each step count, mean and standard deviation over runs, and the student over its teacher."""
    headings = ["steps", *found, *(["distilled / teacher"] if ratios else [])]
    lines = []
    for num_steps in sorted({n for points in found.values() for n in points}):
        line = [str(num_steps), *(mean_and_spread(points.get(num_steps)) for points in found.values())]
        lines.append(line + ([mean_and_spread(ratios.get(num_steps))] if ratios else []))
    return headings, lines


def over_seeds(rows: list[dict[str, str | float]], apart: Sequence[str] = ()) -> Words:
    """Rows that differ in nothing but `seed`, and numbers, as one line: mean and standard deviation; the best in bold.

    Lines with text in a column of `apart` are no comparison with the others and never the best.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        text = tuple((k, v) for k, v in row.items() if isinstance(v, str) and k != "seed")
        groups.setdefault(text, []).append(row)
    headings = list(dict.fromkeys(k for row in rows for k in row))
    may_be_best = [members for text, members in groups.items() if not any(k in apart and v for k, v in text)]
    lines = []
    for text, members in groups.items():
        known = dict(text) | {"seed": ", ".join(str(m.get("seed", "")) for m in members)}
        line = []
        for heading in headings:
            values = _numbers(members, heading)
            cell = known.get(heading) or mean_and_spread(values)
            means = [statistics.mean(found) for m in may_be_best if (found := _numbers(m, heading))]
            bold = len(means) > 1 and members in may_be_best and values and statistics.mean(values) == min(means)
            line.append(f"**{cell}**" if bold else cell)
        lines.append(line)
    return headings, lines


def _numbers(rows: list[dict], heading: str) -> list[float]:
    return [v for v in (finite(row.get(heading)) for row in rows) if v is not None]
