"""How Lightning gets a dataset's batches."""

import signal
from collections.abc import Iterator
from typing import Any

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from pdistill.dataset import ImageSet
from pdistill.dataset.batches import to_float


class ImageDataModule(LightningDataModule):
    """Feeds `data` to one stage. `batch_size` is of an update: it is divided among devices and accumulated batches.

    The images of an update, and their noise, are the same for any number of either. A resumed stage goes on where its
    checkpoint stands.
    """

    def __init__(self, data: ImageSet, batch_size: int, seed: int, stage: int, num_workers: int = 0) -> None:
        super().__init__()
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.stage = stage
        self.num_workers = num_workers

    def train_dataloader(self) -> "DataLoader | Parts":
        """Batches of uint8 images from the trainer's update on, which is 0 or where the checkpoint stood."""
        trainer = self.trainer
        assert trainer is not None  # Lightning attaches it
        world, share = trainer.world_size, self.batch_size // trainer.world_size
        loader = DataLoader(
            self.data.batches(share, self.seed, self.stage, trainer.global_rank, world, trainer.global_step),
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        parts = trainer.accumulate_grad_batches
        return loader if parts == 1 else Parts(loader, parts)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """The images as floats in [-1, 1], made where they are used: bytes travel faster. Halves become floats, too."""
        if condition := batch.get("condition"):
            batch = batch | {"condition": {name: tensor.float() for name, tensor in condition.items()}}
        return batch | {"image": to_float(batch["image"])}


class Parts:
    """The batches of a loader, each in `count` equal parts one after the other, which `part` numbers."""

    def __init__(self, loader: DataLoader, count: int) -> None:
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            size = len(batch["image"]) // self.count
            for k in range(self.count):
                yield _cut(batch, k * size, size) | {"part": k}


def _cut(batch: dict[str, Any], start: int, size: int) -> dict[str, Any]:
    """Of every tensor `size` rows from `start` on, of dictionaries of tensors, too."""
    cut = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            value = _cut(value, start, size)
        cut[name] = value.narrow(0, start, size) if isinstance(value, Tensor) and value.ndim else value
    return cut


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process; one that makes batches goes on until the checkpoint is written."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
