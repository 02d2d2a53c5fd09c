"""What runs achieved, in one sentence made from their metrics."""

import statistics
from collections.abc import Mapping, Sequence

from pdistill.report.rounding import mean_and_spread, number
from pdistill.report.runs import finite, metric_keys
from pdistill.report.tables import evaluations_of, speed_up, steps_of
from pdistill.steps import is_student

Rows = list[dict]


def of_run(rows: Rows) -> str:
    """Of the student of the fewest steps beside the teacher; rows are those of the stages, teacher first."""
    teacher, student = rows[0], last_student(rows)
    key = next(iter(metric_keys(rows)), None)
    if student is None:
        measured = key and number(teacher.get(key))
        return f"A teacher of {steps_of(teacher)} has {_a(key)} of {measured}." if measured else _unmeasured(teacher)
    ours, theirs = (number(row.get(key)) if key else "" for row in (student, teacher))
    subject = f"A student of {steps_of(student)}"
    if ours and theirs:
        said = f"{subject} has {_a(key)} of {ours} where its teacher of {steps_of(teacher)} has {theirs}"
    elif ours:
        said = f"{subject} of a teacher of {steps_of(teacher)} has {_a(key)} of {ours}"
    else:
        said = f"{subject} was distilled from a teacher of {steps_of(teacher)}, and its quality was not measured"
    return f"{said}: {_savings(teacher, student)}."


def last_student(rows: Rows) -> dict | None:
    """The student of the fewest steps, of those that were measured where some were; None where there is none."""
    students = [row for row in rows if is_student(row["stage"])]
    measured = [row for row in students if any(finite(row.get(key)) is not None for key in metric_keys(rows)[:1])]
    return min(measured or students, key=lambda row: row["num_steps"], default=None)


def _a(key: str | None) -> str:
    return f"{'an' if str(key).lower().startswith(tuple('aeio')) else 'a'} {key}"


def _unmeasured(teacher: dict) -> str:
    return f"A teacher of {steps_of(teacher)} was made, and its quality was not measured."


def _savings(teacher: dict, student: dict) -> str:
    said = _fewer(teacher, student)
    factor = speed_up(teacher, student)
    return f"{said}, {factor} times as fast" if factor else said


def _fewer(teacher: dict, student: dict) -> str:
    ratio = evaluations_of(teacher) / evaluations_of(student)
    if ratio <= 1:
        return "as many network evaluations"
    return f"{ratio:.{0 if ratio == int(ratio) else 1}f} times fewer network evaluations"


def of_runs(runs: Mapping[str, Rows], seeds_alone: bool, alike: bool = True) -> str:
    """Of runs that were measured alike: over seeds mean and deviation, else the best and the worst of them."""
    found = _common(runs) if alike else None
    if found is None:
        why = "have no metric in common" if alike else "were measured in different ways"
        return f"{len(runs)} runs, which {why}: they are no comparison."
    key, rows = found
    values = {name: float(row[key]) for name, row in rows.items()}
    one = next(iter(rows.values()))
    what = "student" if is_student(one["stage"]) else "teacher"
    if seeds_alone:
        score = mean_and_spread(list(values.values()))
        said = f"Over {len(runs)} seeds, the {what} of {steps_of(one)} has {_a(key)} of {score}"
        teachers = [of_run[0] for of_run in runs.values()]
        theirs = [value for row in teachers if (value := finite(row.get(key))) is not None]
        if not is_student(one["stage"]) or len(theirs) < len(runs):
            return f"{said}."
        beside = f"where its teacher of {steps_of(teachers[0])} has {mean_and_spread(theirs)}"
        return f"{said} {beside}: {_fewer(teachers[0], one)}."
    best, worst = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    middle = f"the median is {number(statistics.median(values.values()))} and " if len(values) > 2 else ""
    lowest = f"that of {best} has the lowest {key}, {number(values[best])}"
    return f"Of {len(runs)} {what}s of {steps_of(one)}, {lowest}; {middle}the highest is {number(values[worst])}."


def _common(runs: Mapping[str, Rows]) -> tuple[str, dict[str, dict]] | None:
    """A metric, and of each run the stage to compare: the fewest steps that all have students of, else teachers."""
    keys = [metric_keys(rows)[:1] for rows in runs.values()]
    if not keys[0] or any(key != keys[0] for key in keys):
        return None
    (key,) = keys[0]
    counts = [
        {r["num_steps"]: r for r in rows if is_student(r["stage"]) and finite(r.get(key)) is not None}
        for rows in runs.values()
    ]
    shared = set.intersection(*(set(of_run) for of_run in counts))
    if shared:
        return key, dict(zip(runs, (of_run[min(shared)] for of_run in counts), strict=True))
    teachers = {name: rows[0] for name, rows in runs.items()}
    return (key, teachers) if all(finite(row.get(key)) is not None for row in teachers.values()) else None


def only_seeds_differ(choices: Sequence[Mapping[str, str]]) -> bool:
    """Whether runs with these choices are one run with several seeds."""
    others = [{k: v for k, v in chosen.items() if k != "seed"} for chosen in choices]
    seeds = {chosen.get("seed", "") for chosen in choices}
    return len(choices) > 1 and len(seeds) == len(choices) and all(other == others[0] for other in others)
