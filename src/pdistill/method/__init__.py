"""Methods: what a stage of distillation trains. One small class a file, chosen by the group conf/method.

`method=halving` is the paper's. To add one, write a class with the two functions of `Method`, whose loss fits on a
screen, and register it: docs/extending.md.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from pdistill.denoiser import Denoiser
    from pdistill.sampling import Condition
    from pdistill.steps import Stage
    from pdistill.training.settings import Steps


class Method(Protocol):
    """What `DistillationModule` and the commands ask of a method; any object that has these two functions is one.

    A method may be an `nn.Module`: its parameters then are trained with nothing but are kept in checkpoints. What it
    remembers otherwise is lost when a run is resumed.

    It may also have `check(teacher: Denoiser)`, which raises UserError for a teacher that it cannot learn from; the
    commands call it with the first teacher, trained or not, before any work starts.
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
        worth `stage.teacher_steps` of its. Randomness comes from torch's global generator, which is seeded for
        (seed, stage, step, rank) before each call, so that a resumed run repeats it.
        """
        ...
