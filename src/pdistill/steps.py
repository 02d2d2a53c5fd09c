"""Step-count plans: from the teacher's step count down to the last student's."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pdistill.errors import UserError

CONVERTED = "converted"  # the stage that makes a teacher predict what its students do
GUIDED = "guided"  # the stage that teaches classifier-free guidance to a student of every time
TEACHERS = ("teacher", CONVERTED, GUIDED)  # no students: they are sampled with the first step count of the plan


def is_student(stage: str) -> bool:
    """Whether a stage of this name made a student of one step count."""
    return stage.startswith("steps-")


@dataclass(frozen=True)
class Stage:
    """One distillation: a student of `num_steps`, each of them worth `teacher_steps` of its teacher's."""

    index: int  # 1 for the first student; 0 is the teacher's own training
    num_steps: int
    teacher: int  # index of the stage whose result teaches; the student starts from that of the stage before
    teacher_steps: int
    updates: int
    called: str | None = None  # of one trained at every time, as a teacher is: the result has no step count of its own
    counts: tuple[int, ...] = ()  # of a student that knows several; `num_steps` is the first of them

    @property
    def grid(self) -> int:
        """The teacher's steps."""
        return self.num_steps * self.teacher_steps

    @property
    def name(self) -> str:
        if self.counts:
            return f"parallel-{self.grid:04d}"
        return self.called or f"steps-{self.num_steps:04d}"


def stages(
    plan: Sequence[int], updates: int = 300, updates_last_two: int | None = None, max_teacher_steps: int = 2
) -> list[Stage]:
    """The stages of a plan such as [1024, 512, ..., 1] or [1024, 32, 8, 1].

    The first entry is the step count at which the teacher is sampled. The paper trains the last two stages
    twice as long: they get `updates_last_two`, by default twice the others'. A stage is taught by the stage before, or
    by the earliest whose steps come to at most `max_teacher_steps` for one of the student's. Raises UserError unless
    each entry divides the one before.
    """
    plan = list(plan)
    if len(plan) < 2 or not all(isinstance(n, int) and n >= 1 for n in plan):
        raise UserError(f"steps.plan={plan} must list at least two whole step counts, e.g. steps.plan=[32,16,8]")
    for before, after in pairwise(plan):
        if after >= before or before % after:
            raise UserError(
                f"steps.plan={plan}: {after} does not divide {before}. Each step count must be a proper "
                f"divisor of the one before, e.g. steps.plan=[1024,32,8,1]"
            )

    last_two = 2 * updates if updates_last_two is None else updates_last_two

    def stage(i: int) -> Stage:
        teacher = next(k for k in range(i) if k == i - 1 or plan[k] <= max_teacher_steps * plan[i])
        return Stage(i, plan[i], teacher, plan[teacher] // plan[i], last_two if i >= len(plan) - 2 else updates)

    return [stage(i) for i in range(1, len(plan))]
