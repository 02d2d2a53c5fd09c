"""Images in folders and zips, ImageNet at 64x64, and LSUN: how their files are found, and what names their content."""

import functools
import io
import os
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from pdistill.bars import bar
from pdistill.dataset.cache import Source, cached_images, identity_of
from pdistill.dataset.images import ImageSet
from pdistill.dataset.pixels import Transform
from pdistill.dataset.settings import location, reason, shown
from pdistill.errors import UserError
from pdistill.files import digest_of

# Endings that Pillow registers for what is no still picture, or what it can only write.
NO_PICTURES = {
    *(".bufr", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg", ".palm", ".pdf", ".ps"),
}
# Pictures that Pillow cannot open without a plugin. They are not passed over in silence: each is an unusable image.
OTHER_PICTURES = {
    *(".avif", ".avifs", ".eps", ".exr", ".hdr", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl", ".jxr", ".svg"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2", ".emf", ".wmf", ".jp2", ".webp", ".qoi"),
}
# What systems put beside one's files; everything whose name begins with a dot is passed over as well.
OF_THE_SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


@dataclass(frozen=True)
class File:
    """A picture that was found: its name below the root, the content's identity, and what is wrong with it."""

    name: str
    identity: str
    problem: str | None = None


def image_folder(
    path: str,
    image_size: int,
    image_channels: int = 3,
    *,
    flips: bool = True,
    resize: str = "lanczos",
    background: str = "white",
    max_corrupt_fraction: float = 0.001,
    cache: str | None = None,
    name: str = "image_folder",
) -> ImageSet:
    """Every image below the folder, or in the zip, `path`; sub-folders, if there are several, are its classes.

    Links are followed. Hidden files and folders are passed over, and files that are no pictures by their ending;
    pictures that cannot be opened, or are smaller than `image_size`, are left out and listed, up to the share
    `max_corrupt_fraction`. For the rest see `Transform` and `cached_images`. Raises UserError for a path that does not
    exist or cannot be read, for dangling links to folders, and where there are no images.
    """
    transform = Transform(image_size, image_channels, resize, background)
    source = _image_files(path, name)
    return cached_images(source, transform, flips=flips, max_corrupt_fraction=max_corrupt_fraction, cache=cache)


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
    batches = [file for file in sorted(folder.glob("*.npz")) if not _is_hidden(file.name)] if folder.is_dir() else []
    source = _npz_batches(batches) if batches else _image_files(path, "imagenet64")
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
    try:
        import lmdb
    except ImportError as error:
        raise UserError("LSUN's files are lmdb databases: pip install 'pdistill[lsun]'") from error
    wanted = f"{category}_train_lmdb"
    hint = f"give the folder LSUN was exported to, which holds {wanted}/data.mdb, dataset.path=<folder>"
    folder = location("path", path, hint) / wanted
    try:
        (folder / "data.mdb").stat()
    except FileNotFoundError as error:
        raise UserError(f"dataset.path={shown(path)} holds no {wanted}/data.mdb: {hint}") from error
    except OSError as error:
        raise UserError(f"dataset.path={shown(path)} cannot be read ({reason(error)}): {hint}") from error
    try:
        with lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False) as database:
            source = _lmdb_images(database, folder, f"lsun:{category}")
            return cached_images(source, transform, flips=flips, max_corrupt_fraction=max_corrupt_fraction, cache=cache)
    except lmdb.Error as error:
        raise UserError(f"{shown(folder)} is damaged ({reason(error)}): export or copy it again") from error


def _image_files(path: str | None, name: str) -> Source:
    """The images below a folder, or in a zip; class k is the k-th sub-folder by name."""
    hint = "give the images, dataset.path=<folder>"
    root = location("path", path, hint)
    try:
        mode = root.stat().st_mode
        if not stat.S_ISDIR(mode):
            root.open("rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"dataset.path={shown(path)} is not a directory or zip: {hint}") from error
    except OSError as error:
        raise UserError(f"dataset.path={shown(path)} cannot be read ({reason(error)})") from error
    find = _in_folder(root) if stat.S_ISDIR(mode) else _in_zip(root, hint)
    files, ignored, open_named = find()
    if not files:
        raise UserError(
            f"dataset.path={shown(path)} holds no images (looked for .png, .jpg, ... in it and its sub-folders, hidden "
            f"ones left out{'; ' + ignored if ignored else ''})"
        )
    folders = [str(PurePosixPath(file.name).parent) for file in files]
    classes = {folder: k for k, folder in enumerate(sorted(set(folders)))}
    labelled = len(classes) > 1

    def key_of(files: Sequence[File]) -> str:
        return digest_of([os.path.realpath(root), *(f"{file.name!r} {file.identity}" for file in files)])

    def open_image(i: int) -> Image.Image:
        if problem := files[i].problem:
            raise ValueError(problem)
        return open_named(files[i].name)

    return Source(
        f"{name}:{shown(root.resolve().name)}",
        key_of(files),
        lambda: key_of(find()[0]),
        [file.name for file in files],
        open_image,
        [classes[folder] for folder in folders] if labelled else None,
        len(classes) if labelled else None,
        ignored,
    )


def _in_folder(root: Path) -> Callable[[], tuple[list[File], str, Callable[[str], Image.Image]]]:
    def find() -> tuple[list[File], str, Callable[[str], Image.Image]]:
        ignored: Counter[str] = Counter()
        found = bar(_walk(os.fspath(root), "", (), ignored), "looking for images", unit="file")
        files = sorted(found, key=lambda file: file.name)
        return files, _told(ignored), lambda name: Image.open(os.path.join(root, name))

    return find


def _walk(folder: str, above: str, ancestors: tuple[tuple[int, int], ...], ignored: Counter[str]) -> Iterator[File]:
    """The pictures in `folder`, and below. Links are followed, but for one to a folder that it lies in."""
    try:
        here = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(
            f"{shown(folder)} cannot be read ({error.strerror}): change its permissions, or move it"
        ) from error
    if (inode := (here.st_dev, here.st_ino)) in ancestors:
        return
    real = os.path.realpath(folder)
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        name, picture = above + entry.name, _is_picture(entry.name)
        try:
            status = entry.stat()
        except OSError as error:
            target = f"is a link to {shown(os.readlink(entry.path))}: " if entry.is_symlink() else ""
            problem = f"{target}{error.strerror}"
            if not picture:  # it may have been a folder, of who knows how many
                raise UserError(f"{shown(entry.path)}: {problem}. Fix it, or take it out") from error
            yield File(name, problem, problem)
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(entry.path, name + "/", (*ancestors, inode), ignored)
        elif picture:
            place = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            problem = None if stat.S_ISREG(status.st_mode) else "not a regular file"
            yield File(name, f"{place!r} {status.st_size} {status.st_mtime_ns}", problem or _undecodable(name))
        else:
            ignored[os.path.splitext(entry.name)[1].lower()] += 1


def _in_zip(path: Path, hint: str) -> Callable[[], tuple[list[File], str, Callable[[str], Image.Image]]]:
    def find() -> tuple[list[File], str, Callable[[str], Image.Image]]:
        try:
            archive, status = zipfile.ZipFile(path), path.stat()
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise UserError(f"dataset.path={shown(path)} is not a directory or zip: {hint}") from error
        ignored: Counter[str] = Counter()
        members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            name = member.filename.replace("\\", "/")  # some programs write it so
            if member.is_dir() or any(map(_is_hidden, name.split("/"))):
                continue
            if _is_picture(name):
                members[name] = member
            else:
                ignored[PurePosixPath(name).suffix.lower()] += 1
        whole = f"{status.st_size} {status.st_mtime_ns}"
        files = [
            File(name, f"{whole} {members[name].file_size} {members[name].CRC}", _undecodable(name))
            for name in sorted(members)
        ]
        return files, _told(ignored), lambda name: Image.open(io.BytesIO(archive.read(members[name])))

    return find


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in OF_THE_SYSTEM


def _is_decodable(suffix: str) -> bool:
    return Image.registered_extensions().get(suffix) in Image.OPEN and suffix not in NO_PICTURES


def _is_picture(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return suffix in OTHER_PICTURES or _is_decodable(suffix)


def _undecodable(name: str) -> str | None:
    suffix = os.path.splitext(name)[1].lower()
    return None if _is_decodable(suffix) else f"{suffix} cannot be decoded here, convert it to .png or .jpg"


def _told(ignored: Counter[str]) -> str:
    """The files that are no pictures, counted by their ending."""
    if not ignored:
        return ""
    endings = ", ".join(f"{n} {shown(suffix) or 'without an ending'}" for suffix, n in ignored.most_common(5))
    return f"passed over {ignored.total()} files that are no pictures ({endings}{', ...' * (len(ignored) > 5)})"


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
        with np.load(file) as batch:
            return batch["data"].reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)

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
        with np.load(file) as batch:
            labels = batch["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
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

    def __init__(self, database: Any) -> None:
        self.database = database
        self.entries = database.stat()["entries"]

    @functools.cached_property
    def keys(self) -> list[bytes]:
        with self.database.begin() as transaction:
            keys = transaction.cursor().iternext(keys=True, values=False)
            return list(bar(keys, "reading the keys", self.entries, unit="key"))

    def __len__(self) -> int:
        return self.entries

    def __getitem__(self, i: Any) -> Any:
        return os.fsdecode(self.keys[i])


def _lmdb_images(database: Any, folder: Path, name: str) -> Source:
    keys = _Keys(database)
    lock = threading.Lock()

    def open_image(i: int) -> Image.Image:
        with lock:
            key = keys.keys[i]
        with database.begin() as transaction:
            return Image.open(io.BytesIO(transaction.get(key)))

    def content() -> str:
        transactions = database.info()["last_txnid"]  # grows with every change
        return digest_of([identity_of(folder / "data.mdb"), f"{len(keys)} {transactions}"])

    return Source(name, content(), content, keys, open_image)
