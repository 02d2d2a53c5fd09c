"""The training bar."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10  # where the bar goes into a file, which keeps every refresh


class ProgressBar(LightningBar):
    """One bar a stage that counts updates, those before a resume included; the rate is that of this process alone."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description
        self.enabled = True
        self.bar: tqdm | None = None
        self.shown = 0

    def disable(self) -> None:
        """For processes other than the main one."""
        self.enabled = False

    def enable(self) -> None:
        """Shows it again."""
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins at the update that the checkpoint stood at."""
        self.shown = trainer.global_step
        stream = usable_stream()
        if not self.enabled or stream is None:
            return
        interval = 0.1 if stream.isatty() else float(os.environ.get("TQDM_MININTERVAL", SECONDS_BETWEEN_LINES))
        with self._unless_nobody_reads():
            self.bar = tqdm(
                total=trainer.max_steps,
                initial=self.shown,
                desc=self.description,
                unit="update",
                file=stream,
                mininterval=interval,
                maxinterval=interval,
                smoothing=0,
                dynamic_ncols=stream.isatty(),
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the update, if the batch was its last."""
        if self.bar is None or trainer.global_step == self.shown:
            return
        with self._unless_nobody_reads():
            self.bar.update(trainer.global_step - self.shown)
        self.shown = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the bar on the screen."""
        if self.bar is not None:
            with self._unless_nobody_reads():
                self.bar.close()
            self.bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the line, so that the error has its own."""
        self.on_train_end(trainer, pl_module)

    @contextlib.contextmanager
    def _unless_nobody_reads(self) -> Iterator[None]:
        """A closed stream, or a reader that has gone (`| head`), ends the bar and not the training."""
        try:
            yield
        except (OSError, ValueError):
            if self.bar is not None:
                self.bar.disable = True
            self.bar = None


def usable_stream() -> TextIO | None:
    """Standard output if it is open, else standard error, else None."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.isatty()  # of None: AttributeError; of a closed one: ValueError
            return stream
    return None
