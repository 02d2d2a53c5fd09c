"""What every stage of a run shares, held open while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from pdistill.commands import launching, run_directory
from pdistill.commands.settings import Distill, Train
from pdistill.dataset import ImageSet
from pdistill.errors import UserError
from pdistill.metrics.extractors import build
from pdistill.metrics.fid import FID
from pdistill.processes import is_main
from pdistill.training.fit import quietly, start_processes
from pdistill.training.logger import closing
from pdistill.training.module import Recipe
from pdistill.training.settings import Execution, Optimization

GRID_IMAGES = 64  # of every stage's samples.png


@dataclass
class Job:
    """What every stage of a run shares."""

    settings: Train
    directory: Path
    data: ImageSet
    fid: FID | None
    loggers: list[Logger]
    device: torch.device

    def recipe(self, section: Optimization) -> Recipe:
        """How a stage trains."""
        return Recipe(
            section,
            instantiate(self.settings.weighting),
            optimizer=instantiate(self.settings.optimizer),
            seed=self.settings.seed,
            label_dropout=self.settings.label_dropout,
            skips=self.settings.skip_nonfinite_in_a_row if self.settings.skip_nonfinite else None,
            lora_rank=self.settings.lora.rank if isinstance(self.settings, Distill) else None,
            execution=Execution(**{f.name: getattr(self.settings, f.name) for f in fields(Execution)}),
        )


def trainer_of(settings: Train) -> Trainer:
    """A Trainer that fits nothing: it tells of the devices. Raises UserError where this machine cannot run it, or
    other processes were started than it asks for."""
    launching.check_trainer(settings.trainer)
    try:
        with quietly():
            trainer = instantiate(
                settings.trainer, logger=False, enable_checkpointing=False, enable_model_summary=False
            )
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"trainer: {' '.join(str(cause).split())}") from error
    launching.check_trainer(settings.trainer, trainer.num_devices)
    launching.check_seen(trainer.strategy)
    return trainer


def warn_of_emulation(trainer: Trainer) -> None:
    """Of bfloat16 where a CPU has no instructions for it (docs/performance.md has what it costs)."""
    asked = trainer.strategy.root_device.type == "cpu" and str(trainer.precision).startswith("bf16")
    known = torch.backends.mkldnn.is_available()  # whether the processor's instructions are
    if is_main() and asked and known and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print(
            f"warning: this processor has no instructions for bfloat16, so that trainer.precision={trainer.precision} "
            "takes several times as long as 32-true"
        )


@contextmanager
def opened(settings: Train, cfg: DictConfig, directory: Path, data: ImageSet) -> Iterator[Job]:
    """Everything that a run holds open, closed again whatever happens; loggers are told how it ended."""
    fid = None
    if settings.metrics.extractor is not None:
        extractor = build(instantiate(settings.metrics.extractor), data)
        fid = FID(extractor, data, settings.metrics.num_samples, settings.seed)
    writing = run_directory.Writing(cfg, directory, data.fingerprint)
    trainer = trainer_of(settings)
    start_processes(trainer)
    warn_of_emulation(trainer)
    if trainer.num_nodes > 1:
        launching.check_shared(directory)
    device = trainer.strategy.root_device
    loggers: list[Logger] = []
    try:
        loggers += [instantiate(settings.logger)] if settings.logger else []
        with closing(loggers):
            for logger in loggers:
                logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
            yield Job(settings, directory, data, fid, loggers, device)
    finally:
        writing.close()
