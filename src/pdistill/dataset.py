"""Datasets as one array of uint8 images, and batches of them in [-1, 1]."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pdistill.errors import UserError
from pdistill.randomness import generator


@dataclass(frozen=True)
class ImageSet:
    """All images of a dataset: `images` uint8 (N, C, H, W), `labels` int64 (N,) or None."""

    name: str
    images: Tensor
    labels: Tensor | None = None
    flips: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    @property
    def num_classes(self) -> int:
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def fingerprint(self) -> str:
        """Names the exact pixels and labels, and so the transform that made them."""
        digest = hashlib.sha256(f"{self.name} {tuple(self.images.shape)} flips={self.flips}".encode())
        digest.update(self.images.numpy())
        if self.labels is not None:
            digest.update(self.labels.numpy())
        return digest.hexdigest()[:16]


def digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits: 8x8, grey, ten classes. A mirrored digit is none: no flips."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.round(data.images * (255 / 16)).astype(np.uint8))[:, None]
    return ImageSet("digits", images, torch.from_numpy(data.target.astype(np.int64)))


def image_folder(path: str, image_size: int, image_channels: int = 3, flips: bool = True) -> ImageSet:
    """Every image below `path`, centre-cropped to a square and resized; sub-folders, if any, are its classes.

    Held in memory as uint8: N C S^2 bytes. Raises UserError for a path that does not exist, holds no images,
    or holds a file that is named like an image and cannot be read.
    """
    if path is None or not Path(path).is_dir():
        raise UserError(f"dataset.path={path} is not a directory: give a folder of images, dataset.path=<folder>")
    extensions = Image.registered_extensions()
    files = sorted(p for p in Path(path).rglob("*") if extensions.get(p.suffix.lower()) in Image.OPEN)
    if not files:
        raise UserError(f"dataset.path={path} holds no images (looked for .png, .jpg, ... in it and its sub-folders)")
    folders = [str(p.parent.relative_to(path)) for p in files]
    classes = {folder: k for k, folder in enumerate(sorted(set(folders)))}
    images = np.empty((len(files), image_channels, image_size, image_size), np.uint8)
    for k, file in enumerate(track(files, f"reading {path}", disable=len(files) < 2000)):
        images[k] = _read_image(file, image_size, image_channels)
    labels = torch.tensor([classes[folder] for folder in folders]) if len(classes) > 1 else None
    return ImageSet(f"image_folder:{Path(path).name}", torch.from_numpy(images), labels, flips)


def _read_image(file: Path, size: int, channels: int) -> np.ndarray:
    """uint8 (C, size, size): the central square, resized with antialiasing."""
    try:
        with Image.open(file) as image:
            image = image.convert({1: "L", 3: "RGB"}[channels])
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side))
            pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{file} cannot be read as an image ({error}): mend it or take it out of the folder") from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


class Batches(IterableDataset):
    """An endless stream of random batches; the one at a step is a function of (seed, stage, step, rank).

    Images are drawn with replacement and, where the dataset allows it, flipped left to right at random.
    """

    def __init__(self, data: ImageSet, batch_size: int, seed: int, stage: int, rank: int, start: int) -> None:
        self.data = data
        self.batch_size = batch_size
        self.key = (seed, stage, rank)
        self.start = start

    def batch(self, step: int) -> dict:
        seed, stage, rank = self.key
        random = generator(seed, stage, step, rank, 1)  # the 1 keeps it apart from the step's own numbers
        index = torch.randint(len(self.data.images), (self.batch_size,), generator=random)
        image = self.data.images[index]
        if self.data.flips:
            mirrored = torch.rand(self.batch_size, generator=random) < 0.5
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
        batch = {"image": image, "step": step}
        if self.data.labels is not None:
            batch["label"] = self.data.labels[index]
        return batch

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        step, stride = self.start, 1
        if worker is not None:
            step, stride = step + worker.id, worker.num_workers
        while True:
            yield self.batch(step)
            step += stride


def to_float(image: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """[-1, 1] -> uint8, clipped and rounded to the nearest."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class ImageDataModule(LightningDataModule):
    """Feeds `data` to one stage of training. `batch_size` is global: it is divided among the devices."""

    def __init__(self, data: ImageSet, batch_size: int, seed: int, stage: int, num_workers: int = 0) -> None:
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
        batches = Batches(self.data, share, self.seed, self.stage, self.trainer.global_rank, start)
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        return batch | {"image": to_float(batch["image"])}
