"""Datasets: every choice of the `dataset` group is a function here that returns an ImageSet.

Small ones are one uint8 tensor in memory. Images of any size are cropped and resized once into a memory-mapped
cache (image_cache.py). What the `datasets` library loads is in huggingface.py.
"""

import contextlib
import functools
import hashlib
import io
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pdistill.dataset.batches import Batches
from pdistill.dataset.cache import Source, cached_images, digest_of
from pdistill.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """All images of a dataset: `images` uint8 (N, C, H, W), in memory or mapped, `labels` int64 (N,) or None.

    `digest` of the pixels and labels saves reading them all for the fingerprint.
    """

    name: str
    images: Tensor
    labels: Tensor | None = None
    flips: bool = False
    digest: str | None = None

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
        if self.digest is not None:
            digest.update(self.digest.encode())
        else:
            digest.update(self.images.numpy())
            if self.labels is not None:
                digest.update(self.labels.numpy())
        return digest.hexdigest()[:16]

    def batches(self, batch_size: int, seed: int, stage: int, rank: int = 0, world: int = 1, start: int = 0) -> Batches:
        """Batches for training from step `start`: `batch_size` images for this rank at each step."""
        return Batches(self.images, self.labels, self.flips, batch_size, seed, stage, rank, world, start)


def digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits: 8x8, grey, ten classes. A mirrored digit is none: no flips."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.round(data.images * (255 / 16)).astype(np.uint8))[:, None]
    return ImageSet("digits", images, torch.from_numpy(data.target.astype(np.int64)))


def cifar10(path: str, download: bool = False, flips: bool = True) -> ImageSet:
    """The 50,000 training images of CIFAR-10, 32x32 in ten classes, from the Python version's files in `path`.

    Raises UserError where they are not there, or differ from the published checksums, or cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(path, train=True, download=download)
    except (RuntimeError, OSError, EOFError) as error:
        tried = f" and could not be downloaded ({_first_line(error)})" if download else ""
        raise UserError(
            f"CIFAR-10 is not in dataset.path={path}, or is damaged{tried}: put cifar-10-batches-py there, or go "
            f"online and give dataset.download=true"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet("cifar10", images, torch.tensor(data.targets), flips)


def image_folder(
    path: str,
    image_size: int,
    image_channels: int = 3,
    flips: bool = True,
    resize: str = "lanczos",
    max_corrupt_fraction: float = 0.001,
    cache: str | None = None,
    name: str = "image_folder",
) -> ImageSet:
    """Every image below the folder, or in the zip, `path`; sub-folders, if there are several, are its classes.

    Cropped to the central square and resized once: see `image_cache.cached_images` for the other arguments and
    what is refused. Raises UserError for a path that does not exist or holds no images.
    """
    source = _image_files(path, name)
    images, labels, digest = cached_images(source, image_size, image_channels, resize, max_corrupt_fraction, cache)
    return ImageSet(source.name, images, labels, flips, digest)


def imagenet64(
    path: str, flips: bool = True, max_corrupt_fraction: float = 0.001, cache: str | None = None
) -> ImageSet:
    """ImageNet at 64x64 with its classes: a folder of JPEGs, one sub-folder per class, or of the npz batches.

    JPEGs are centre-cropped and area-resized as in the authors' code. The npz files are those of Downsampled ImageNet
    (Chrabaszcz et al., 2017): `data` uint8 (N, 3 * 64 * 64), channels first, and `labels` from 1.
    """
    batches = sorted(Path(path).glob("*.npz")) if path and Path(path).is_dir() else []
    if not batches:
        return image_folder(path, 64, 3, flips, "area", max_corrupt_fraction, cache, name="imagenet64")
    source = _npz_batches(batches)
    images, labels, digest = cached_images(source, 64, 3, "area", max_corrupt_fraction, cache)
    return ImageSet(source.name, images, labels, flips, digest)


def lsun(
    path: str,
    category: str,
    image_size: int = 128,
    flips: bool = True,
    max_corrupt_fraction: float = 0.001,
    cache: str | None = None,
) -> ImageSet:
    """One category of LSUN from its lmdb export `path`/<category>_train_lmdb, bilinear with antialiasing."""
    try:
        import lmdb
        from torchvision.datasets import LSUN
    except ImportError as error:
        raise UserError("LSUN's files are lmdb databases: pip install 'pdistill[lsun]'") from error
    folder = Path(path or "", f"{category}_train_lmdb").resolve()
    if path is None or not (folder / "data.mdb").exists():
        raise UserError(f"dataset.path={path} holds no {folder.name}/data.mdb: give the folder LSUN was exported to")
    try:
        # torchvision leaves a list of keys in the working directory, and believes one that it finds there.
        with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
            data = LSUN(str(folder.parent), classes=[f"{category}_train"])
    except lmdb.Error as error:
        raise UserError(f"{folder} is damaged ({error}): export or copy it again") from error
    keys = [key.decode() for key in data.dbs[0].keys]
    key = digest_of([*keys, str((folder / "data.mdb").stat().st_size)])
    source = Source(f"lsun:{category}", key, keys, lambda i: data[i][0])
    images, _, digest = cached_images(source, image_size, 3, "bilinear", max_corrupt_fraction, cache)
    return ImageSet(source.name, images, None, flips, digest)


def _image_files(path: str | None, name: str) -> Source:
    """The images below a folder, or in a zip; class k is the k-th sub-folder by name."""
    if path is None or not (Path(path).is_dir() or zipfile.is_zipfile(path)):
        raise UserError(f"dataset.path={path} is not a directory or zip: give the images, dataset.path=<folder>")
    root, archive = Path(path), None
    if root.is_dir():
        found = {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*") if _is_image(p)}
    else:
        archive = zipfile.ZipFile(root)
        found = {f.filename: f.file_size for f in archive.infolist() if _is_image(Path(f.filename))}
    if not found:
        raise UserError(f"dataset.path={path} holds no images (looked for .png, .jpg, ... in it and its sub-folders)")
    names = sorted(found)
    folders = [str(Path(n).parent) for n in names]
    classes = {folder: k for k, folder in enumerate(sorted(set(folders)))}
    labels = [classes[f] for f in folders] if len(classes) > 1 else None

    def open_image(i: int) -> Image.Image:
        return Image.open(root / names[i] if archive is None else io.BytesIO(archive.read(names[i])))

    return Source(f"{name}:{root.name}", digest_of([f"{n} {found[n]}" for n in names]), names, open_image, labels)


def _npz_batches(files: Sequence[Path]) -> Source:
    """The images of npz files in turn; no more than two files' pixels are in memory at once."""
    labels, names = [], []
    for file in files:
        try:
            with np.load(file) as batch:
                of_file = batch["labels"].astype(np.int64) - 1
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} is no batch of Downsampled ImageNet ({_first_line(error)})") from error
        labels.append(of_file)
        names += [f"{file.name}[{k}]" for k in range(len(of_file))]
    starts = np.cumsum([0, *map(len, labels)])
    lock = threading.Lock()

    @functools.lru_cache(2)
    def pixels_of(file: Path) -> np.ndarray:
        with np.load(file) as batch:
            return batch["data"].reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)

    def open_image(i: int) -> Image.Image:
        k = int(np.searchsorted(starts, i, "right")) - 1
        with lock:
            pixels = pixels_of(files[k])
        return Image.fromarray(pixels[i - starts[k]])

    key = digest_of([f"{f.name} {f.stat().st_size}" for f in files])
    return Source("imagenet64:npz", key, names, open_image, np.concatenate(labels))


def _is_image(path: Path) -> bool:
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN and "__MACOSX" not in path.parts


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
