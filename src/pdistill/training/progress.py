"""Training in the display: `pdistill.display`, or alone a bar."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningBar

from pdistill.bars import Bar, bar
from pdistill.display import TRAINING


class ProgressBar(LightningBar):
    """One bar a stage that counts updates, those before a resume included; see `pdistill.bars`."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description
        self.enabled = True
        self.bar: Bar | None = None

    def disable(self) -> None:
        """For processes other than the main one."""
        self.enabled = False

    def enable(self) -> None:
        """Shows it again."""
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins at the update that the checkpoint stood at."""
        if self.enabled:
            options: Any = {"initial": trainer.global_step, "leave": True, "phase": TRAINING}
            self.bar = bar((), self.description, trainer.max_steps, "update", **options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the update, if the batch was its last."""
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.done)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the bar on the screen."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the line, so that the error has its own."""
        self.on_train_end(trainer, pl_module)
