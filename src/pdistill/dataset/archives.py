"""ImageNet at 64x64, from JPEGs or npz batches, and LSUN, from its lmdb exports."""

import functools
import importlib.util
import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdistill.bars import bar
from pdistill.dataset.cache import Source, cached_images, identity_of
from pdistill.dataset.folders import image_files, is_hidden
from pdistill.dataset.images import ImageSet
from pdistill.dataset.lmdbs import Database
from pdistill.dataset.pixels import Transform, open_picture
from pdistill.dataset.settings import location, reason, shown
from pdistill.dataset.zips import array_in, opened
from pdistill.errors import UserError
from pdistill.files import digest_of
from pdistill.reading import regular


def imagenet64(
    path: str,
    *,
    flips: bool = True,
    background: str = "white",
    max_corrupt_fraction: float = 0.001,
    cache: str | None = None,
) -> ImageSet:
    """ImageNet at 64x64 with its classes: a folder of JPEGs, one sub-folder per class, or of the npz batches.

    JPEGs are centre-cropped and area-resized as in the authors' code. The npz files are those of Downsampled ImageNet
    (Chrabaszcz et al., 2017): `data` uint8 (N, 3 * 64 * 64), channels first, and `labels` from 1.
    """
    transform = Transform(64, 3, "area", background)
    folder = location("path", path, "give the images, dataset.path=<folder>")
    batches = [file for file in sorted(folder.glob("*.npz")) if not is_hidden(file.name)] if folder.is_dir() else []
    source = _npz_batches(batches) if batches else image_files(path, "imagenet64")
    return cached_images(source, transform, flips=flips, max_corrupt_fraction=max_corrupt_fraction, cache=cache)


def lsun(
    path: str,
    category: str,
    image_size: int = 128,
    *,
    flips: bool = True,
    max_corrupt_fraction: float = 0.001,
    cache: str | None = None,
) -> ImageSet:
    """One category of LSUN from its lmdb export `path`/<category>_train_lmdb, bilinear with antialiasing."""
    transform = Transform(image_size, 3, "bilinear")
    if importlib.util.find_spec("lmdb") is None:
        raise UserError("LSUN's files are lmdb databases: pip install 'pdistill[lsun]'")
    wanted = f"{category}_train_lmdb"
    hint = f"give the folder LSUN was exported to, which holds {wanted}/data.mdb, dataset.path=<folder>"
    folder = location("path", path, hint) / wanted
    try:
        (folder / "data.mdb").stat()
    except FileNotFoundError as error:
        raise UserError(f"dataset.path={shown(path)} holds no {wanted}/data.mdb: {hint}") from error
    except OSError as error:
        raise UserError(f"dataset.path={shown(path)} cannot be read ({reason(error)}): {hint}") from error
    regular(folder / "data.mdb")
    with Database(folder) as database:
        source = _lmdb_images(database, folder, f"lsun:{category}")
        return cached_images(source, transform, flips=flips, max_corrupt_fraction=max_corrupt_fraction, cache=cache)


def _npz_batches(files: Sequence[Path]) -> Source:
    """The images of npz files in turn; no more than two files' pixels are in memory at once."""
    names: list[str] = []
    labels = [_npz_labels(file) for file in files]
    for file, of_file in zip(files, labels, strict=True):
        names += [f"{shown(file.name)}[{k}]" for k in range(len(of_file))]
    starts = np.cumsum([0, *map(len, labels)])
    lock = threading.Lock()

    @functools.lru_cache(2)
    def pixels_of(file: Path) -> np.ndarray:
        with opened(os.fspath(file)) as batch:
            data = array_in(batch, "data")
        if data.dtype != np.uint8:
            raise ValueError(f"{file.name} holds pixels of {data.dtype}, not uint8")
        return data.reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)

    def open_image(i: int) -> Image.Image:
        k = int(np.searchsorted(starts, i, "right")) - 1
        with lock:
            pixels = pixels_of(files[k])
        return Image.fromarray(pixels[i - starts[k]])

    def key() -> str:
        return digest_of(map(identity_of, files))

    return Source("imagenet64:npz", key(), key, names, open_image, np.concatenate(labels).tolist())


def _npz_labels(file: Path) -> np.ndarray:
    """int64 (N,), from 0."""
    try:
        regular(file)
        with opened(os.fspath(file)) as batch:
            labels = array_in(batch, "labels")
    except UserError:
        raise
    except Exception as error:  # zipfile's, zlib's and numpy's, of many kinds
        raise UserError(f"{shown(file)} is no batch of Downsampled ImageNet ({reason(error)})") from error
    if (
        labels.dtype.kind not in "iu"
        or labels.ndim != 1
        or (len(labels) and not 1 <= labels.min() <= labels.max() <= 1000)
    ):
        span = f", from {labels.min()} to {labels.max()}" if labels.dtype.kind in "iuf" and labels.size else ""
        raise UserError(
            f"{shown(file)} is no batch of Downsampled ImageNet: its labels are {labels.dtype} {labels.shape}{span}, "
            f"not whole numbers from 1 to 1000"
        )
    return labels.astype(np.int64) - 1


class _Keys(Sequence):
    """The keys of an lmdb database, read when first asked for: there may be millions."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @functools.cached_property
    def keys(self) -> list[bytes]:
        return list(bar(self.database.keys(), "reading the keys", self.database.entries, unit="key"))

    def __len__(self) -> int:
        return self.database.entries

    def __getitem__(self, i: Any) -> Any:
        return os.fsdecode(self.keys[i])


def _lmdb_images(database: Database, folder: Path, name: str) -> Source:
    keys = _Keys(database)
    lock = threading.Lock()

    def open_image(i: int) -> Image.Image:
        with lock:
            key = keys.keys[i]
        return open_picture(io.BytesIO(database.get(key)))

    def content() -> str:  # the number of transactions grows with every change
        return digest_of([identity_of(folder / "data.mdb"), f"{len(keys)} {database.transactions}"])

    return Source(name, content(), content, keys, open_image)
