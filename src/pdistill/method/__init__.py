"""Methods: what a stage of distillation trains. One small class a file, chosen by the group conf/method.

`method=halving` is the paper's; docs/methods.md says what each is for. To add one, write a class with the two functions
of `Method`, whose loss fits on a screen, and register it: docs/extending.md.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pdistill.errors import UserError
from pdistill.sampling import DDIM, STOCHASTIC
from pdistill.training.settings import Distillation

if TYPE_CHECKING:
    from torch import Tensor

    from pdistill.denoiser import Denoiser
    from pdistill.sampling import Condition
    from pdistill.steps import Stage
    from pdistill.training.settings import Steps


class Method(Protocol):
    """What `DistillationModule` and the commands ask of a method; any object that has these two functions is one.

    Each stage has a copy of its own, so that nothing of one stage reaches the next. A method may be an `nn.Module`: its
    parameters then are trained with nothing but are kept in checkpoints; it stays in eval mode. What it remembers
    otherwise is lost when a run is resumed. It may also have the hooks `Begins` and `BeforeUpdate`.

    It may also have `check(teacher: Denoiser)`, which raises UserError for a teacher that it cannot learn from; the
    commands call it with the first teacher, trained or not, before any work starts. Its students are sampled by the
    sampler that its attribute `sampler` names, ddim if it has none.
    """

    def stages(self, steps: "Steps", max_teacher_steps: int) -> "list[Stage]":
        """The stages of a run, in their order, for `steps.plan` and the updates beside it.

        The commands call this before any work starts. Raises UserError for a plan that the method cannot follow.
        """
        ...

    def losses(
        self,
        student: "Denoiser",
        teacher: "Denoiser",
        stage: "Stage",
        weighting: "Callable[[Tensor], Tensor]",
        x: "Tensor",
        condition: "Condition",
    ) -> "tuple[Tensor, Tensor]":
        """The loss of every image (B,), with gradients to the student, and its log-SNR (B,), for the log.

        x (B, C, H, W) are images in [-1, 1]; the teacher is frozen and in eval mode, and one of the student's steps is
        worth `stage.teacher_steps` of its. Draw random numbers with `uniform`, `integers` and `normal` of
        `pdistill.randomness`: then a batch taken in parts, on several devices too, has the numbers of the whole.
        torch's global generator is seeded for the update and the part before each call.
        """
        ...


@runtime_checkable
class Begins(Protocol):
    """The optional hook of a method whose student is not, at first, what it starts from."""

    def begin(self, student: "Denoiser", stage: "Stage") -> "Denoiser":
        """The student before its first update, made of a copy of what it starts from."""
        ...


@runtime_checkable
class BeforeUpdate(Protocol):
    """The optional hook of a method that changes while a stage trains."""

    def before_update(self, student: "Denoiser", done: int, updates: int) -> None:
        """Called once before every update of the weights, `done` of the stage's `updates` being done; on every process.

        Also called with done = 0 when the stage is made: what it makes then is there when a checkpoint's tensors are
        read, and calling it twice must do no harm.
        """
        ...


def sampler_taught(method: object) -> str:
    """The name of the sampler that a method's students are for."""
    return getattr(method, "sampler", DDIM)


def check_sampler(method: object, teacher: "Denoiser") -> None:
    """Raises UserError for a teacher that is a student of another sampler than the method teaches."""
    taught = sampler_taught(method)
    if teacher.num_steps is not None and teacher.sampler != taught:
        raise UserError(
            f"the teacher was distilled for {teacher.num_steps} steps of the sampler {teacher.sampler}, and these "
            f"students are for {taught}, whose steps have another length: give method=halving "
            f"method.stochastic={str(teacher.sampler == STOCHASTIC).lower()}, or the teacher it was distilled from"
        )


def refuse_max_teacher_steps(method: str, given: int) -> None:
    """Raises UserError where `distillation.max_teacher_steps` was changed, for a method that has no use for it."""
    if given != Distillation.max_teacher_steps:
        raise UserError(
            f"distillation.max_teacher_steps={given} is of method=halving, and method={method} does not use it: "
            f"leave it out"
        )
