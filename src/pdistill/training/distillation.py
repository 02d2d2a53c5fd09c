"""One stage of progressive distillation: a student, its frozen teacher, and a method."""

import copy
from typing import Any, Self

from torch import Tensor, nn

from pdistill import lora
from pdistill.denoiser import Denoiser
from pdistill.method import BeforeUpdate, Begins, Method, check_sampler, sampler_taught
from pdistill.method.halving import Halving
from pdistill.optimizer import annealing
from pdistill.steps import Stage
from pdistill.training import execution
from pdistill.training.module import DenoisingModule, Recipe
from pdistill.training.settings import Distillation
from pdistill.weighting import with_loss


class DistillationModule(DenoisingModule):
    """A student of `stage.num_steps` that learns from the frozen `teacher` what `method` asks of it.

    The student starts as a copy of `start`, by default of the teacher, with the recipe's dropout; how the learning rate
    falls over `stage.updates`, and the distance in the loss, are as the recipe's settings say (without a recipe: their
    defaults). The default method is halving; the stage has its own copy of it. The teacher is in eval mode, gets no
    gradients and is not in the checkpoint. Raises UserError for a teacher that is a student of another sampler than the
    method's.
    """

    left_out = ("teacher.",)

    def __init__(
        self,
        teacher: Denoiser,
        stage: Stage,
        recipe: Recipe | None = None,
        method: Method | None = None,
        start: Denoiser | None = None,
    ) -> None:
        recipe, method = recipe or Recipe(Distillation()), method or Halving()
        check_sampler(method, teacher)
        student = copy.deepcopy(start or teacher)
        if isinstance(method, Begins):
            student = method.begin(student, stage)
        student.num_steps = None if stage.called else stage.num_steps
        student.sampler = sampler_taught(method)
        student.lineage = [*student.lineage, stage.name if stage.called or stage.counts else stage.num_steps]
        if recipe.lora_rank is None:
            student.adapters = None  # which say what was added to weights that now change
        else:
            lora.add(student, recipe.lora_rank)
        settings = recipe.settings
        super().__init__(student, recipe, stage.index, annealing(settings, stage.updates), stage.updates)
        self.weighting = with_loss(recipe.weighting, settings.loss, settings.huber_c)
        self.teacher = execution.arrange(teacher, recipe.execution).requires_grad_(False).eval()
        self.stage = stage
        self.method = copy.deepcopy(method)
        self.prepared: int | None = None  # the update that the method was told of
        self._before_update(0)
        self.train()

    @property
    def student(self) -> Denoiser:
        """The denoiser that is trained."""
        return self.denoiser

    def train(self, mode: bool = True) -> Self:
        """As of any module, but the teacher stays in eval mode, and so does what the method holds."""
        super().train(mode)
        self.teacher.eval()
        if isinstance(self.method, nn.Module):
            self.method.eval()
        return self

    def _before_update(self, done: int) -> None:
        if isinstance(self.method, BeforeUpdate):
            self.method.before_update(self.student, done, self.stage.updates)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Tells the method of the update that this batch begins; of accumulated batches the first does."""
        done = self.trainer.global_step
        if done != self.prepared:
            self._before_update(done)
            self.prepared = done

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(B,) losses and (B,) logsnr of a batch, as the method says."""
        condition = self.condition_of(batch)
        arguments = (self.student, self.teacher, self.stage, self.weighting, batch["image"], condition)
        return self.method.losses(*arguments)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the teacher out: it is on disk already."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith(self.left_out)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the teacher back, so that a checkpoint in which anything else is missing is refused."""
        checkpoint["state_dict"] |= {f"teacher.{k}": v for k, v in self.teacher.state_dict().items()}
