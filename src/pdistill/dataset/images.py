"""What a dataset is to the rest of the program, and the two small ones, which are held in memory as one tensor."""

import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdistill.bars import bar
from pdistill.dataset.batches import Batches, BatchKey
from pdistill.dataset.settings import flag, location, reason
from pdistill.errors import UserError
from pdistill.files import digest_of


@dataclass(frozen=True)
class ImageSet:
    """All images of a dataset. Raises UserError where they or the labels are not as described here.

    Args:
        name: for messages and tables; it says nothing about the content.
        images: uint8 (N, C, H, W), in memory or mapped from a file.
        labels: int64 (N,), from 0 to num_classes - 1; None where there are none.
        flips: whether training mirrors images left to right at random.
        digest: `digest_of_images` of both, where it is known already; it saves reading them all.
        classes: the number of classes, where the given labels may not show them all.
        prompts: the words of every class, where the images have words: label k stands for prompts[k].
    """

    name: str
    images: Tensor
    labels: Tensor | None = None
    flips: bool = False
    digest: str | None = None
    classes: int | None = None
    prompts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise UserError(
                f"the images of dataset {self.name} must be uint8 (N, C, H, W), not {images.dtype} "
                f"{tuple(images.shape)}"
            )
        if labels is None:
            return
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise UserError(
                f"the labels of dataset {self.name} must be int64 ({len(images)},), not {labels.dtype} "
                f"{tuple(labels.shape)}"
            )
        least, largest = map(int, labels.aminmax())
        if least < 0 or (self.classes is not None and largest >= self.classes):
            raise UserError(
                f"the labels of dataset {self.name} must be from 0 to the number of classes - 1"
                f"{'' if self.classes is None else f' = {self.classes - 1}'}, not from {least} to {largest}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def num_classes(self) -> int:
        """0 where there are no labels."""
        if self.labels is None:
            return 0
        return int(self.labels.max()) + 1 if self.classes is None else self.classes

    @cached_property
    def fingerprint(self) -> str:
        """Names the exact pixels, labels and prompts: neither a path, nor the dataset's name, nor `flips`."""
        digest = self.digest or digest_of_images(self.images, self.labels)
        return digest if self.prompts is None else digest_of([digest, *self.prompts])

    def batches(self, batch_size: int, seed: int, stage: int, rank: int = 0, world: int = 1, start: int = 0) -> Any:
        """Batches for training from step `start`: `batch_size` images for this rank at each step.

        An iterable dataset of {"image": uint8 (B, C, H, W), "label": int64 (B,) where there are labels, "step": int}.
        """
        key = BatchKey(batch_size, seed, stage, rank, world, start)
        return Batches(self.images, self.labels, self.flips, key)


def digest_of_images(images: Iterable[Tensor], labels: Tensor | None) -> str:
    """16 hexadecimal digits that name the pixels uint8 (C, H, W) of each image, their order, and the labels."""
    chain, shape = b"", None
    for image in bar(images, "hashing the images", unit="image"):
        shape = tuple(image.shape)
        chain = chained(chain, hashlib.sha256(image.contiguous().numpy().data).digest())
    return digest_of_chain(chain, shape, labels)


def chained(chain: bytes, image: bytes) -> bytes:
    """The state of `digest_of_images` after one more image, of SHA-256 `image`; 32 bytes, which a file can keep."""
    return hashlib.sha256(chain + image).digest()


def digest_of_chain(chain: bytes, shape: tuple[int, ...] | None, labels: Tensor | None) -> str:
    """The last step of `digest_of_images`."""
    digest = hashlib.sha256(chain + str(shape).encode())
    if labels is not None:
        digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits: 8x8, grey, ten classes. A mirrored digit is none: no flips."""
    table = _table_of_digits()
    images = torch.from_numpy(np.round(table[:, :-1] * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    return ImageSet("digits", images, torch.from_numpy(table[:, -1].astype(np.int64)))


def _table_of_digits() -> np.ndarray:
    """Rows of 64 pixels from 0 to 16 and the class. The file alone: to import scikit-learn takes half a second."""
    package = importlib.util.find_spec("sklearn")
    if package and package.origin:
        file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return np.column_stack([data.data, data.target])


def cifar10(path: str, *, download: bool = False, flips: bool = True) -> ImageSet:
    """The 50,000 training images of CIFAR-10, 32x32 in ten classes, from the Python version's files in `path`.

    The files are held against their published checksums each time. Raises UserError where they are not there, differ
    from the checksums, or cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    folder = location("path", path, "give the folder that holds cifar-10-batches-py, dataset.path=<folder>")
    flag("download", download)
    flag("flips", flips)
    try:
        data = CIFAR10(str(folder), train=True, download=download)
    except (RuntimeError, OSError, EOFError) as error:
        tried = f" and could not be downloaded ({reason(error)})" if download else ""
        denied = f" and cannot be read ({reason(error)})" if isinstance(error, PermissionError) else ""
        raise UserError(
            f"CIFAR-10 is not in dataset.path={path}, or is damaged{tried or denied}: put cifar-10-batches-py there, "
            f"or go online and give dataset.download=true"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet("cifar10", images, torch.tensor(data.targets), flips, classes=10)
