"""How Lightning gets a dataset's batches."""

import signal
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from pdistill.dataset import ImageSet
from pdistill.dataset.batches import to_float


class ImageDataModule(LightningDataModule):
    """Feeds `data` to one stage. `batch_size` is of an update: it is divided among devices and accumulated batches.

    The images of an update are the same for any number of either. A resumed stage goes on where its checkpoint stands.
    """

    def __init__(self, data: ImageSet, batch_size: int, seed: int, stage: int, num_workers: int = 0) -> None:
        super().__init__()
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.stage = stage
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        """Batches of uint8 images from the trainer's update on; step k's are those of every rank's k-th batch."""
        trainer = self.trainer
        assert trainer is not None  # Lightning attaches it
        world, accumulate = trainer.world_size, trainer.accumulate_grad_batches
        start = trainer.global_step * accumulate  # 0, or where the checkpoint stood
        share = self.batch_size // (world * accumulate)
        return DataLoader(
            self.data.batches(share, self.seed, self.stage, trainer.global_rank, world, start),
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """The images as floats in [-1, 1], made where they are used: bytes travel faster. Halves become floats, too."""
        if condition := batch.get("condition"):
            batch = batch | {"condition": {name: tensor.float() for name, tensor in condition.items()}}
        return batch | {"image": to_float(batch["image"])}


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process; one that makes batches goes on until the checkpoint is written."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
