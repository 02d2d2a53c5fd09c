"""Batches of a dataset, each a function of (seed, stage, step, rank), and how Lightning gets them."""

from collections.abc import Iterator

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pdistill.randomness import generator


class Batches(IterableDataset):
    """An endless stream of batches; the one at a step is a function of (seed, stage, step, rank).

    Every epoch is a new permutation of the images, of which step and rank take their own consecutive share: ranks
    and workers overlap nowhere, nothing is left out, and the images of a step are the same for any number of
    ranks. Where `flips`, images are mirrored left to right at random.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        flips: bool,
        batch_size: int,
        seed: int,
        stage: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        self.images, self.labels, self.flips = images, labels, flips
        self.batch_size = batch_size
        self.seed, self.stage, self.rank, self.world = seed, stage, rank, world
        self.start = start
        self.permutation = (-1, torch.empty(0))  # of the epoch that was asked for last

    def _image_at(self, position: Tensor) -> Tensor:
        """Positions in the endless stream, none decreasing, to indices of images."""
        epochs = position // len(self.images)
        index = torch.empty_like(position)
        for epoch in epochs.unique().tolist():
            if self.permutation[0] != epoch:
                random = generator(self.seed, self.stage, epoch, 2)
                self.permutation = epoch, torch.randperm(len(self.images), generator=random)
            here = epochs == epoch
            index[here] = self.permutation[1][position[here] % len(self.images)]
        return index

    def batch(self, step: int) -> dict:
        index = self._image_at((step * self.world + self.rank) * self.batch_size + torch.arange(self.batch_size))
        image = self.images[index]
        if self.flips:
            image = flip(image, generator(self.seed, self.stage, step, self.rank, 1))
        batch = {"image": image, "step": step}
        if self.labels is not None:
            batch["label"] = self.labels[index]
        return batch

    def __iter__(self) -> Iterator[dict]:
        step, stride = self.start, 1
        worker = get_worker_info()
        if worker is not None:
            step, stride = step + worker.id, worker.num_workers
        while True:
            yield self.batch(step)
            step += stride


def flip(image: Tensor, random: torch.Generator) -> Tensor:
    """Each of (B, C, H, W) mirrored left to right, or not, with equal chances."""
    mirrored = torch.rand(len(image), generator=random) < 0.5
    return torch.where(mirrored[:, None, None, None], image.flip(-1), image)


def to_float(image: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """[-1, 1] -> uint8, clipped and rounded to the nearest."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class ImageDataModule(LightningDataModule):
    """Feeds `data`, an ImageSet, to one stage. `batch_size` is global: it is divided among the devices."""

    def __init__(self, data, batch_size: int, seed: int, stage: int, num_workers: int = 0) -> None:
        super().__init__()
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.stage = stage
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        world, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
        start = self.trainer.global_step * accumulate  # 0, or where the checkpoint stood
        share = self.batch_size // (world * accumulate)
        return DataLoader(
            self.data.batches(share, self.seed, self.stage, self.trainer.global_rank, world, start),
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        return batch | {"image": to_float(batch["image"])}
