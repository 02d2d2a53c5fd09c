"""Batches of a dataset, each a function of (seed, stage, step, rank)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pdistill.randomness import generator

FLIPS = 4096  # positions of the stream whose flips are drawn at once


@dataclass(frozen=True)
class BatchKey:
    """Which batches of which stream of images."""

    batch_size: int
    """Images of this rank in a step."""
    seed: int
    """The run's seed."""
    stage: int
    """0 for the teacher's training, 1 for the first student's, ..."""
    rank: int = 0
    """Which of the processes asks."""
    world: int = 1
    """How many processes there are."""
    start: int = 0
    """The first step."""


class Batches(IterableDataset):
    """An endless stream of batches; the one at a step is a function of (seed, stage, step, rank).

    Every epoch is a new permutation of the images, of which step and rank take their own consecutive share: ranks
    and workers overlap nowhere, nothing is left out. Where `flips`, images are mirrored left to right at random. Both
    depend on the position in the stream alone, so that a step's images are the same for any number of ranks.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, flips: bool, key: BatchKey) -> None:
        self.images, self.labels, self.flips, self.key = images, labels, flips, key
        self.permutation = (-1, torch.empty(0))  # of the epoch that was asked for last

    def _image_at(self, position: Tensor) -> Tensor:
        """Positions in the endless stream, none decreasing, to indices of images."""
        epochs = position // len(self.images)
        index = torch.empty_like(position)
        for epoch in epochs.unique().tolist():
            if self.permutation[0] != epoch:
                random = generator("permutation", self.key.seed, self.key.stage, epoch)
                self.permutation = epoch, torch.randperm(len(self.images), generator=random)
            here = epochs == epoch
            index[here] = self.permutation[1][position[here] % len(self.images)]
        return index

    def _mirrored_at(self, position: Tensor) -> Tensor:
        """Positions in the endless stream to whether the image there is mirrored."""
        blocks = position // FLIPS
        mirrored = torch.empty(len(position), dtype=torch.bool)
        for block in blocks.unique().tolist():
            random = generator("flips", self.key.seed, self.key.stage, block)
            here = blocks == block
            mirrored[here] = (torch.rand(FLIPS, generator=random) < 0.5)[position[here] % FLIPS]
        return mirrored

    def batch(self, step: int) -> dict:
        """{"image": uint8 (B, C, H, W), "step": step}, and "label": int64 (B,) where there are labels."""
        key = self.key
        position = (step * key.world + key.rank) * key.batch_size + torch.arange(key.batch_size)
        index = self._image_at(position)
        image = self.images[index]
        if self.flips:
            image = flip(image, self._mirrored_at(position))
        batch = {"image": image, "step": step}
        if self.labels is not None:
            batch["label"] = self.labels[index]
        return batch

    def __iter__(self) -> Iterator[dict]:
        step, stride = self.key.start, 1
        worker = get_worker_info()
        if worker is not None:
            step, stride = step + worker.id, worker.num_workers
        while True:
            yield self.batch(step)
            step += stride


def flip(image: Tensor, mirrored: Tensor) -> Tensor:
    """(B, C, H, W), those of `mirrored` (B,) turned left to right."""
    return torch.where(mirrored[:, None, None, None], image.flip(-1), image)


def to_float(image: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]; latents in half precision -> float32."""
    return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image.float()


def to_uint8(image: Tensor) -> Tensor:
    """[-1, 1] -> uint8, clipped and rounded to the nearest."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
