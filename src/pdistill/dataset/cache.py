"""Images of any size, cropped and resized once into a memory-mapped array of uint8 on disk.

A cache is a directory: `images.bin`, uint8 (N, C, S, S) and nothing else; `labels.npy`, int64 (N,), if there are
labels; and, once it is complete, `cache.json`, which says what it was made from and how. While it is being made,
`progress.json` says how far it got, and the same command goes on from there.
"""

import fcntl
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pdistill.errors import UserError
from pdistill.files import write_json

CHUNK = 1024  # images between two notes of progress
GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "F"}
LONG = 2000  # images, from which on a progress bar is worth having
IN_MEMORY = 2 * 1024**3  # bytes; larger caches stay on disk


@dataclass(frozen=True)
class Source:
    """Images to be cached: item i is `open(i)`, its name `names[i]`, its class `labels[i]`.

    `key` stands for the content, so that a cache of other images is not taken for this one's. `open` may raise
    whatever a decoder raises, and is called from several threads.
    """

    name: str
    key: str
    names: Sequence[str]
    open: Callable[[int], Image.Image]
    labels: Sequence[int] | None = None


def cache_directory() -> Path:
    """Where caches of images, extractors and statistics are kept: $PDISTILL_CACHE, or ~/.cache/pdistill."""
    return Path(os.environ.get("PDISTILL_CACHE", Path.home() / ".cache" / "pdistill"))


def digest_of(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def cached_images(
    source: Source, image_size: int, image_channels: int, resize: str, max_corrupt_fraction: float, cache: str | None
) -> tuple[Tensor, Tensor | None, str]:
    """Images (N, C, S, S), labels (N,) or None, and a digest of both, from the cache or through it.

    `resize` is area, bilinear or lanczos, all of them antialiased, after a central square crop. Unreadable or too
    small images are left out and listed in cache.json. Raises UserError where they are more than
    `max_corrupt_fraction`, where all are grey and `image_channels` is 3, and where the directory `cache` holds a cache
    that was made otherwise or is damaged.
    """
    if image_channels not in (1, 3) or resize not in RESIZERS:
        raise UserError(
            f"dataset.image_channels={image_channels} must be 1 or 3, and dataset.resize={resize} one of "
            f"{', '.join(RESIZERS)}"
        )
    made_by = {
        "source": source.name,
        "content": source.key,
        "image_size": image_size,
        "image_channels": image_channels,
        "resize": resize,
        "format": 1,
    }
    key = digest_of([f"{k}={v}" for k, v in made_by.items()])
    directory = Path(cache) if cache else cache_directory() / "images" / key
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:  # other ranks and runs wait here until it is made
        fcntl.flock(lock, fcntl.LOCK_EX)
        for file in ("cache.json", "progress.json"):
            _check_made_by(directory / file, made_by)
        if not (directory / "cache.json").exists():
            _Maker(source, image_size, image_channels, resize, max_corrupt_fraction, directory, made_by).make()
    return _load(directory)


def crop_and_resize(image: Image.Image, size: int, channels: int, resize: str) -> np.ndarray:
    """uint8 (C, size, size): the central square. Raises ValueError for an image smaller than that."""
    side = min(image.size)
    if side < size:
        raise ValueError(f"{image.width}x{image.height} pixels, smaller than {size}x{size}")
    image = image.convert({1: "L", 3: "RGB"}[channels])
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    pixels = RESIZERS[resize](square, size).reshape(size, size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_made_by(file: Path, made_by: dict) -> None:
    if not file.exists():
        return
    theirs = json.loads(file.read_text())["made_by"]
    differing = [f"{k} {theirs.get(k)}, now {made_by[k]}" for k in made_by if theirs.get(k) != made_by[k]]
    if differing:
        raise UserError(
            f"the cache {file.parent} was made otherwise ({'; '.join(differing)}): give another dataset.cache=..., "
            f"or delete it to have it made anew"
        )


def _load(directory: Path) -> tuple[Tensor, Tensor | None, str]:
    description = json.loads((directory / "cache.json").read_text())
    shape, file = tuple(description["shape"]), directory / "images.bin"
    if not file.exists() or file.stat().st_size != np.prod(shape):
        size = file.stat().st_size if file.exists() else 0
        raise UserError(
            f"{file} is damaged: {size} bytes instead of {np.prod(shape)}. Delete {directory} to have it made anew"
        )
    mapped = np.memmap(file, np.uint8, "c", shape=shape)  # copy on write: torch wants a writable array
    images = torch.from_numpy(np.array(mapped) if mapped.nbytes <= IN_MEMORY else mapped)
    labels = directory / "labels.npy"
    return images, torch.from_numpy(np.load(labels)) if labels.exists() else None, description["digest"]


class _Maker:
    def __init__(self, source, image_size, image_channels, resize, max_corrupt_fraction, directory, made_by) -> None:
        self.source, self.size, self.channels = source, image_size, image_channels
        self.resize = resize
        self.allowed = int(max_corrupt_fraction * len(source.names))
        self.directory, self.made_by = directory, made_by

    def make(self) -> None:
        progress = self._progress()
        total, bytes_each = len(self.source.names), self.channels * self.size**2
        file = self.directory / "images.bin"
        with ThreadPoolExecutor(os.cpu_count()) as pool, file.open("ab") as out:
            out.truncate(len(progress["kept"]) * bytes_each)  # what a killed process wrote after its last note
            bar = tqdm(
                total=total,
                initial=progress["done"],
                desc=f"caching {self.source.name}",
                unit="image",
                disable=total < LONG,
            )
            while progress["done"] < total:
                chunk = range(progress["done"], min(total, progress["done"] + CHUNK))
                for i, pixels, grey, problem in pool.map(self._read, chunk):
                    if problem is None:
                        out.write(pixels)
                        progress["kept"].append(i)
                        progress["grey"] += grey
                    else:
                        progress["skipped"].append({"name": self.source.names[i], "reason": problem})
                        self._refuse_many(progress["skipped"])
                out.flush()
                progress["done"] = chunk.stop
                write_json(self.directory / "progress.json", progress)
                bar.update(len(chunk))
            bar.close()
        self._refuse_grey(progress)
        self._finish(progress)

    def _progress(self) -> dict:
        try:
            return json.loads((self.directory / "progress.json").read_text())
        except FileNotFoundError:
            return {"made_by": self.made_by, "done": 0, "kept": [], "grey": 0, "skipped": []}

    def _read(self, i: int) -> tuple[int, bytes, bool, str | None]:
        """(i, pixels, whether it is grey, what is wrong with it)."""
        try:
            with self.source.open(i) as image:
                pixels = crop_and_resize(image, self.size, self.channels, self.resize)
                return i, pixels.tobytes(), image.mode in GREY_MODES, None
        except Exception as error:  # decoders raise whatever comes to them: OSError, SyntaxError, struct.error, ...
            return i, b"", False, one_line(error)

    def _refuse_many(self, skipped: list[dict]) -> None:
        if len(skipped) > self.allowed:
            named = ", ".join(f"{s['name']}: {s['reason']}" for s in skipped[:3])
            raise UserError(
                f"{self.source.name}: {len(skipped)} of {len(self.source.names)} images cannot be used, and "
                f"{self.allowed} may ({named}): mend them or take them out, give a smaller dataset.image_size, or "
                f"raise dataset.max_corrupt_fraction"
            )

    def _refuse_grey(self, progress: dict) -> None:
        if self.channels == 3 and progress["kept"] and progress["grey"] == len(progress["kept"]):
            raise UserError(
                f"{self.source.name}: all images are grey, and dataset.image_channels=3 wants colours: "
                f"use dataset.image_channels=1"
            )

    def _finish(self, progress: dict) -> None:
        if not progress["kept"]:
            raise UserError(f"{self.source.name} holds no images that can be used")
        if progress["skipped"]:
            names = ", ".join(s["name"] for s in progress["skipped"][:3])
            print(
                f"{self.source.name}: left out {len(progress['skipped'])} of {len(self.source.names)} images "
                f"({names}{', ...' * (len(progress['skipped']) > 3)}; all in {self.directory / 'cache.json'})",
                file=sys.stderr,
            )
        digest = hashlib.sha256()
        if self.source.labels is not None:
            labels = np.asarray(self.source.labels, np.int64)[progress["kept"]]
            np.save(self.directory / "labels.npy", labels)
            digest.update(labels)
        with (self.directory / "images.bin").open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        shape = (len(progress["kept"]), self.channels, self.size, self.size)
        description = {"made_by": self.made_by, "shape": shape, "skipped": progress["skipped"]}
        write_json(self.directory / "cache.json", description | {"digest": digest.hexdigest()[:16]})
        (self.directory / "progress.json").unlink()


@functools.lru_cache(256)
def _overlaps(side: int, size: int) -> np.ndarray:
    """(size, side): how much of target pixel i is covered by source pixel j; rows add up to one."""
    edges = np.linspace(0, side, size + 1)
    pixels = np.arange(side)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (covered.clip(0) * (size / side)).astype(np.float32)


def _area(square: Image.Image, size: int) -> np.ndarray:
    """The mean over the area that each target pixel covers, with fractional pixels at its edges."""
    weights = _overlaps(square.width, size)
    pixels = np.asarray(square, np.float32).reshape(square.width, square.width, -1)  # (side, side, C)
    columns = np.tensordot(weights, pixels, (1, 0))  # (size, side, C)
    return np.rint(np.tensordot(weights, columns, (1, 1)).swapaxes(0, 1)).astype(np.uint8)


def _pil(filter: Image.Resampling) -> Callable[[Image.Image, int], np.ndarray]:
    return lambda square, size: np.asarray(square.resize((size, size), filter))


RESIZERS = {"area": _area, "bilinear": _pil(Image.Resampling.BILINEAR), "lanczos": _pil(Image.Resampling.LANCZOS)}
