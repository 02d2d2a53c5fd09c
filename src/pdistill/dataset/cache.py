"""Images of any size, cropped and resized once into a memory-mapped array of uint8 on disk.

A cache is a directory: `images.bin`, uint8 (N, C, S, S) and nothing else; `labels.npy`, int64 (N,), if there are
labels; and, once it is complete, `cache.json`, which says what it was made from and how, and the digest of both. While
it is being made, `progress.json` says how far it got, and the same command goes on from there.
"""

import contextlib
import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pdistill.bars import bar
from pdistill.dataset.images import ImageSet, chained, digest_of_chain
from pdistill.dataset.pixels import Transform, square_pixels
from pdistill.dataset.settings import flag, fraction, location, reason, shown
from pdistill.errors import UserError
from pdistill.files import cache_directory, digest_of, locked, read_json, write_json
from pdistill.processes import is_main
from pdistill.reading import array_of, regular

FORMAT = 2  # 1: pdistill 0.1.0, which knew neither EXIF nor transparency nor 16 bits
CHUNK = 256  # images between two notes of progress
IN_MEMORY = 2 * 1024**3  # bytes; larger caches stay on disk


@dataclass(frozen=True)
class Source:
    """Images to be cached: item i is `open(i)`, its name `names[i]`, its class `labels[i]`."""

    name: str
    """Of the dataset, for messages."""
    key: str
    """Stands for the content: other content, another key."""
    key_now: Callable[[], str]
    """The key, worked out again: what was cached is old if it has changed since."""
    names: Sequence[str]
    """Of the images, for messages."""
    open: Callable[[int], Image.Image]
    """May raise whatever a decoder raises; called from several threads."""
    labels: Sequence[int] | None = None
    """From 0."""
    classes: int | None = None
    """How many classes there are, where the labels may not show them all."""
    prompts: Sequence[str] | None = None
    """The words of every class, where the images have words."""
    note: str = ""
    """What else there is to say when the cache is made."""


def cached_images(
    source: Source,
    transform: Transform,
    *,
    flips: bool = False,
    max_corrupt_fraction: float = 0.001,
    cache: str | None = None,
) -> ImageSet:
    """The source's images from the cache, or through it.

    The cache is `cache`, or by default a directory named by the source's key and the transform; each call holds it
    against the source as it is now. Unreadable or too small images are left out and listed in cache.json. Raises
    UserError where they are more than `max_corrupt_fraction`, where all are grey and `transform.image_channels` is 3,
    and where the cache was made otherwise, is damaged, or cannot be written.
    """
    flag("flips", flips)
    fraction("max_corrupt_fraction", max_corrupt_fraction)
    labels = None if source.labels is None else np.asarray(source.labels, np.int64)
    made_by = {
        "source": shown(source.name),
        "content": source.key,
        "labels": None if labels is None else hashlib.sha256(labels.data).hexdigest()[:16],
        **transform.settings(),
        "format": FORMAT,
    }
    if cache is not None:
        directory = location("cache", cache, "give a directory, or null for the default one")
    else:
        directory = cache_directory() / "images" / digest_of(f"{k}={v}" for k, v in made_by.items())
    try:
        if not _is_complete(directory, made_by):
            with _locked(directory) as lock:
                if not _is_complete(directory, made_by):  # nobody else has made it meanwhile
                    if lock is None:
                        raise PermissionError(f"{directory} may not be written to")
                    _Maker(source, transform, max_corrupt_fraction, directory, made_by).make(labels)
        images, kept_labels, digest = _load(directory)
    except OSError as error:
        raise UserError(
            f"the cache {shown(directory)} cannot be used ({reason(error)}): give another one, "
            f"dataset.cache=<directory>, or another place for all, PDISTILL_CACHE=<directory>"
        ) from error
    return ImageSet(source.name, images, kept_labels, flips, digest, source.classes, source.prompts)


def identity_of(file: Path) -> str:
    """Names a file's content without reading it: full path, size and time of modification."""
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"{shown(file)} cannot be read ({reason(error)})") from error
    return f"{os.path.realpath(file)!r} {status.st_size} {status.st_mtime_ns}"


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[Any]:
    """Other ranks and runs wait here until the cache is made; None where it cannot be written."""
    file = directory / ".lock"
    with locked(file, wait=False) as lock:
        if lock is not None:
            yield lock
            return
    if is_main() and os.access(file, os.W_OK):
        print(f"waiting for the process that makes the cache {shown(directory)}", file=sys.stderr)
    with locked(file) as lock:
        yield lock


def _is_complete(directory: Path, made_by: dict) -> bool:
    """Raises UserError for a cache, or the beginning of one, that was made otherwise."""
    for file in ("cache.json", "progress.json"):
        content = _json(directory / file)
        if content is None:
            continue
        theirs = content.get("made_by") if isinstance(content, dict) else None
        theirs = theirs if isinstance(theirs, dict) else {}
        differing = [f"{k} {theirs.get(k)}, now {made_by[k]}" for k in made_by if theirs.get(k) != made_by[k]]
        if differing:
            raise UserError(
                f"the cache {shown(directory)} was made otherwise ({'; '.join(differing)}): give another "
                f"dataset.cache=..., or delete it to make it again"
            )
        if file == "cache.json":
            return True
    return False


def _load(directory: Path) -> tuple[Tensor, Tensor | None, str]:
    """(images, labels, digest). The pixels are read again only if the file was touched since it was written."""
    description = _json(directory / "cache.json")
    if not _is_description(description):
        raise _damaged(directory / "cache.json", "it does not say what a cache says")
    shape, file = tuple(description["shape"]), directory / "images.bin"
    size = regular(file) if file.exists() else 0
    if size != math.prod(shape):
        raise _damaged(file, f"{size} bytes instead of {math.prod(shape)}")
    chain = bytes.fromhex(description["pixels"])
    mapped = np.memmap(file, np.uint8, "c", shape=shape)  # copy on write: torch wants a writable array
    if file.stat().st_mtime_ns != description["written"] and _chain_of(mapped) != chain:
        raise _damaged(file, "its content is not what was written")
    images = torch.from_numpy(np.array(mapped) if mapped.nbytes <= IN_MEMORY else mapped)
    labels = None
    if description["made_by"]["labels"] is not None:
        try:
            labels = torch.from_numpy(array_of(directory / "labels.npy", "int64", shape[:1]))
        except (OSError, ValueError) as error:
            raise _damaged(directory / "labels.npy", reason(error)) from error
    if digest_of_chain(chain, shape[1:], labels) != description["digest"]:
        raise _damaged(directory / "labels.npy", "its content is not what was written")
    return images, labels, description["digest"]


def _is_description(content: Any) -> bool:
    """Whether it is what a finished cache says of itself; that its values are right, is for digests to tell."""
    shape = content.get("shape")
    return (
        isinstance(shape, list)
        and len(shape) == 4
        and all(type(side) is int and side > 0 for side in shape)
        and _is_hex(content.get("pixels"))
        and "labels" in content["made_by"]
        and {"digest", "written"} <= content.keys()
    )


def _is_progress(content: Any, total: int) -> bool:
    """Whether it is what an unfinished cache of `total` images says of itself."""
    done, kept, grey, skipped = (content.get(key) for key in ("done", "kept", "grey", "skipped"))
    return (
        all(type(number) is int for number in (done, kept, grey))
        and 0 <= grey <= kept <= done <= total
        and (_is_hex(content.get("pixels")) or content.get("pixels") == "")
        and isinstance(skipped, list)
        and all(isinstance(s, dict) and type(s.get("index")) is int and 0 <= s["index"] < total for s in skipped)
        and len(skipped) == done - kept
        and all({"name", "reason"} <= s.keys() for s in skipped)
    )


def _is_hex(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def _json(file: Path) -> Any:
    """The content; None where there is no file. To delete a damaged one alone would not help."""
    try:
        return read_json(file)
    except UserError as error:
        raise _damaged(file, "it is no JSON") from error


def _damaged(file: Path, problem: str) -> UserError:
    return UserError(f"{shown(file)} is damaged: {problem}. Delete {shown(file.parent)} to make it again")


def _chain_of(images: np.ndarray) -> bytes:
    chain = b""
    for image in bar(images, "checking the cache of images", unit="image"):
        chain = chained(chain, hashlib.sha256(image.data).digest())
    return chain


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """A thread for each processor; whoever interrupts them does not wait for what has not begun."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Maker:
    """Makes one cache. Its progress: how many are done and kept, the digest so far, and what was left out."""

    def __init__(
        self, source: Source, transform: Transform, max_corrupt_fraction: float, directory: Path, made_by: dict
    ) -> None:
        self.source, self.transform = source, transform
        self.total = len(source.names)
        self.allowed = int(max_corrupt_fraction * self.total)
        self.directory, self.made_by = directory, made_by
        self.bytes_each = transform.image_channels * transform.image_size**2

    def make(self, labels: np.ndarray | None) -> None:
        progress = self._progress()
        if self.source.note:
            print(f"{self.source.name}: {self.source.note}", file=sys.stderr)
        title, done = f"caching {shown(self.source.name)}", progress["done"]
        counted = bar((), title, self.total, "image", initial=done, everywhere=True)  # one process makes it
        with counted, _threads() as pool, (self.directory / "images.bin").open("ab") as out:
            out.truncate(progress["kept"] * self.bytes_each)  # what a killed process wrote after its last note
            while progress["done"] < self.total:
                chunk = range(progress["done"], min(self.total, progress["done"] + CHUNK))
                chain = bytes.fromhex(progress["pixels"])
                for i, pixels, digest, grey, problem in pool.map(self._read, chunk):
                    counted.update()
                    if problem is None:
                        out.write(pixels)
                        chain = chained(chain, digest)
                        progress["kept"] += 1
                        progress["grey"] += grey
                    else:
                        progress["skipped"].append({"index": i, "name": self.source.names[i], "reason": problem})
                        self._refuse_many(progress["skipped"])
                out.flush()
                os.fsync(out.fileno())
                progress |= {"done": chunk.stop, "pixels": chain.hex()}
                write_json(self.directory / "progress.json", progress)
        self._refuse_grey(progress)
        self._finish(progress, labels)

    def _progress(self) -> dict:
        """Where an interrupted process stopped, or the beginning; written down before the first image is."""
        file = self.directory / "images.bin"
        size = file.stat().st_size if file.exists() else 0
        progress: Any = _json(self.directory / "progress.json")
        if progress is None and size:
            raise UserError(f"{shown(file)} is there, and is no cache of pdistill's: give another dataset.cache=...")
        known = progress is not None and _is_progress(progress, self.total)
        if progress is None or not known or size < progress["kept"] * self.bytes_each:
            progress = {"made_by": self.made_by, "done": 0, "kept": 0, "grey": 0, "pixels": "", "skipped": []}
            write_json(self.directory / "progress.json", progress)
        return progress

    def _read(self, i: int) -> tuple[int, bytes, bytes, bool, str | None]:
        """(i, pixels, their SHA-256, whether it is a grey image, what is wrong with it)."""
        try:
            with self.source.open(i) as image:
                array, grey = square_pixels(image, self.transform)
            pixels = array.tobytes()
            return i, pixels, hashlib.sha256(pixels).digest(), grey, None
        except UnidentifiedImageError:
            return i, b"", b"", False, "is no image, or of a format that cannot be decoded here"
        except Exception as error:  # decoders raise whatever comes to them: OSError, SyntaxError, struct.error, ...
            return i, b"", b"", False, reason(error)

    def _refuse_many(self, skipped: list[dict]) -> None:
        if len(skipped) > self.allowed:
            named = ", ".join(f"{shown(s['name'])}: {s['reason']}" for s in skipped[:3])
            raise UserError(
                f"{shown(self.source.name)}: {len(skipped)} of {self.total} images cannot be used, and "
                f"{self.allowed} may ({named}): fix them or take them out, give a smaller dataset.image_size, or "
                f"raise dataset.max_corrupt_fraction"
            )

    def _refuse_grey(self, progress: dict) -> None:
        if self.transform.image_channels == 3 and progress["kept"] and progress["grey"] == progress["kept"]:
            raise UserError(
                f"{shown(self.source.name)}: all images are grey, and dataset.image_channels=3 wants colours: "
                f"use dataset.image_channels=1"
            )

    def _finish(self, progress: dict, labels: np.ndarray | None) -> None:
        if not progress["kept"]:
            raise UserError(f"{shown(self.source.name)} holds no images that can be used")
        self._refuse_changed()
        if progress["skipped"]:
            names = ", ".join(shown(s["name"]) for s in progress["skipped"][:3])
            print(
                f"{shown(self.source.name)}: left out {len(progress['skipped'])} of {self.total} images "
                f"({names}{', ...' * (len(progress['skipped']) > 3)}; all in {shown(self.directory / 'cache.json')})",
                file=sys.stderr,
            )
        kept = None
        if labels is not None:
            kept = np.delete(labels, [s["index"] for s in progress["skipped"]])
            np.save(self.directory / "labels.npy", kept)
        shape = (self.transform.image_channels, self.transform.image_size, self.transform.image_size)
        chain = bytes.fromhex(progress["pixels"])
        description = {
            "made_by": self.made_by,
            "shape": (progress["kept"], *shape),
            "skipped": progress["skipped"],
            "pixels": chain.hex(),
            "digest": digest_of_chain(chain, shape, None if kept is None else torch.from_numpy(kept)),
            "written": (self.directory / "images.bin").stat().st_mtime_ns,
        }
        write_json(self.directory / "cache.json", description)
        (self.directory / "progress.json").unlink()

    def _refuse_changed(self) -> None:
        """What was cached may be old and new images mixed, if the source has changed meanwhile."""
        if self.source.key_now() != self.source.key:
            for file in ("images.bin", "progress.json"):
                (self.directory / file).unlink()
            raise UserError(
                f"{shown(self.source.name)}: the images changed while they were being cached: give the same command "
                f"again when they are complete"
            )
