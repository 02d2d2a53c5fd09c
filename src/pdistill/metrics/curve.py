"""A metric against step count: the teacher by its own samplers, measured point by point into teacher/curve.json."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pdistill import processes
from pdistill.checks import is_count
from pdistill.errors import UserError
from pdistill.files import read_json, write_json

STUDENTS = "distilled"  # the curve of the students, each at its own step count
PROVENANCE = "provenance"  # the one key of curve.json that is no sampler
OF_A_POINT = ("num_steps", "sampler", "version")  # what differs between points that stand in one file

Curves = dict[str, dict[int, list[float]]]  # of each sampler: the values at each step count, one for each run


def measure_teacher(
    path: Path,
    steps: Sequence[int],
    samplers: Sequence[str],
    measure: Callable[[int, str], float],
    made_with: Mapping[str, object] | None = None,
) -> None:
    """Fills the JSON at `path`, sampler -> step count -> `measure(step count, sampler)`, point by point.

    Points that stand there are kept if they were made with the same: `made_with` is the provenance of any of them
    (`FID.provenance`), whose hash of the weights tells a teacher from another at the same place. All ranks call this,
    and `measure`; the main process writes.
    """
    mine = {k: v for k, v in (made_with or {}).items() if k not in OF_A_POINT}
    points = processes.of_main(read_json(path, {}) if processes.is_main() else None)
    known = isinstance(points, dict) and all(isinstance(of_sampler, dict) for of_sampler in points.values())
    if not known or (made_with is not None and points.get(PROVENANCE) != mine):
        points = {PROVENANCE: mine}
    for sampler in samplers:
        for num_steps in steps:
            of_sampler = points.setdefault(sampler, {})
            if str(num_steps) not in of_sampler:
                of_sampler[str(num_steps)] = measure(num_steps, sampler)
                if processes.is_main():
                    write_json(path, points)


def teacher_points(run: Path) -> dict[str, dict[int, float]]:
    """What `measure_teacher` wrote for a run: sampler -> step count -> value; empty if it did not.

    Raises UserError where the file is damaged.
    """
    path = run / "teacher" / "curve.json"
    points = read_json(path, {})
    try:
        if not isinstance(points, dict):
            raise ValueError("no JSON object")
        samplers = {name: of_sampler for name, of_sampler in points.items() if name != PROVENANCE}
        found = {name: {int(n): value for n, value in of_sampler.items()} for name, of_sampler in samplers.items()}
        if not all(map(is_count, (n for of_sampler in found.values() for n in of_sampler))):
            raise ValueError("step counts that are none")
        return found
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the run's command makes it again") from error
