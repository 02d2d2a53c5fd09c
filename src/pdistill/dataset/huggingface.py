"""Images that the `datasets` library loads: from the hub by name, from a folder, or saved to disk.

A map-style dataset goes through the cache once, as folders do. A stream is read while training; only its first images
are cached, and metrics are measured against those.
"""

import hashlib
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import IterableDataset, get_worker_info

from pdistill.bars import bar
from pdistill.checks import whole
from pdistill.dataset.batches import BatchKey, flip
from pdistill.dataset.cache import Source, cached_images, identity_of
from pdistill.dataset.images import ImageSet
from pdistill.dataset.pixels import Transform, square_pixels
from pdistill.dataset.settings import flag, fraction, location, reason, shown
from pdistill.errors import UserError
from pdistill.files import digest_of
from pdistill.randomness import generator, seed_of

READ_AHEAD = 32  # examples asked of a stream at once
MAX_CLASSES = 100_000  # larger labels are some other number: the network has a row for each class


class StreamError(UserError):
    """A UserError that stays one line when it comes out of a DataLoader's worker, which wraps a trace around it."""

    def __init__(self, message: str) -> None:
        lines = message.strip().splitlines() or [""]
        super().__init__(lines[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


def load(
    path: str,
    image_size: int,
    image_channels: int = 3,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    streaming: bool = False,
    reference_images: int = 10000,
    shuffle_buffer: int = 10000,
    flips: bool = True,
    resize: str = "lanczos",
    background: str = "white",
    max_corrupt_fraction: float = 0.001,
    cache: str | None = None,
) -> ImageSet:
    """The images of a split, with labels if `label_column` is given; see `Transform` and `cached_images` for the rest.

    `revision` is a commit, tag or branch on the hub. Labels that are strings become classes in the order of their
    sorted names. `streaming` trains on the stream, shuffled within `shuffle_buffer` examples, and measures against its
    first `reference_images`. Raises UserError where the library is missing, the dataset, split or column is not there,
    or the column of labels holds something else than classes.
    """
    transform = Transform(image_size, image_channels, resize, background)
    flag("streaming", streaming)
    flag("flips", flips)
    whole("dataset.reference_images", reference_images, 1)
    whole("dataset.shuffle_buffer", shuffle_buffer, 1)
    fraction("max_corrupt_fraction", max_corrupt_fraction)
    place = _Place(_expanded(path), subset, revision, str(split))
    image, label = str(image_column), None if label_column is None else str(label_column)
    dataset, identity = _open(place, streaming, image, label)
    labels = _Labels(label, place, getattr(dataset.features.get(label), "num_classes", None))
    rows: Any = _first(dataset, reference_images, place) if streaming else dataset

    def key() -> str:
        return digest_of((_content_of(row[image]) for row in rows) if streaming else _identity_of_rows(rows, image))

    classes = None
    if label is not None:
        classes = labels.of_rows([row[label] for row in rows]) if streaming else labels.of_column(rows[label][:])
    source = Source(
        name=f"huggingface:{shown(Path(place.path).name)}",
        key=key(),
        key_now=key,
        names=[f"row {i} of {shown(path)}" for i in range(len(rows))],
        open=lambda i: _decode(rows[i][image]),
        labels=classes,
        classes=labels.count,
    )
    cached = cached_images(source, transform, flips=flips, max_corrupt_fraction=max_corrupt_fraction, cache=cache)
    if not streaming:
        return cached
    digest = digest_of([cached.fingerprint, *identity])
    stream = Stream(dataset, image, labels, transform, max_corrupt_fraction, shuffle_buffer)
    return StreamedImageSet(cached.name, cached.images, cached.labels, flips, digest, cached.classes, stream)


@dataclass(frozen=True)
class Stream:
    """A stream of encoded examples, and how they become images and labels."""

    rows: Any
    """The `datasets.IterableDataset`."""
    image_column: str
    labels: "_Labels"
    transform: Transform
    max_corrupt_fraction: float
    shuffle_buffer: int
    """Examples among which the next one is chosen at random."""


@dataclass(frozen=True)
class StreamedImageSet(ImageSet):
    """`images` are the stream's first, for metrics; training reads `stream`.

    The fingerprint names those first images, and what the stream is known by: its files, and their time of
    modification, or the commit on the hub.
    """

    stream: Any = None

    def batches(self, batch_size: int, seed: int, stage: int, rank: int = 0, world: int = 1, start: int = 0) -> Any:
        """See ImageSet.batches."""
        return StreamedBatches(self.stream, self.flips, BatchKey(batch_size, seed, stage, rank, world, start))


class StreamedBatches(IterableDataset):
    """Batches of an endless, shuffled stream; the one at a step is a function of (seed, stage, step, rank).

    Each rank's workers share the stream without overlap or loss, shard by shard where there are enough, else
    example by example. A restart reads past what was used before. The number of workers is part of the key, too.
    """

    def __init__(self, stream: Stream, flips: bool, key: BatchKey) -> None:
        self.stream, self.flips, self.key = stream, flips, key
        self.shuffled = stream.rows.shuffle(
            seed=seed_of("stream", key.seed, key.stage) % 2**32, buffer_size=stream.shuffle_buffer
        )

    def _rows(self, part: int, parts: int) -> Iterator[dict]:
        """This part of the stream, epoch after epoch."""
        from datasets.distributed import split_dataset_by_node

        mine = split_dataset_by_node(self.shuffled, part, parts)
        for epoch in range(2**31):
            mine.set_epoch(epoch)
            found = False
            for rows in mine.iter(READ_AHEAD):  # iter, not __iter__, which would split once more among workers
                found = True
                yield from (dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True))
            if not found:
                raise StreamError(f"the stream has fewer than {parts} examples: use fewer devices or num_workers")

    def _examples(self, rows: Iterator[dict]) -> Iterator[tuple[np.ndarray, int | None]]:
        """(uint8 (C, S, S), label) of those that can be used."""
        bad, labels = 0, self.stream.labels
        for seen, row in enumerate(rows, 1):
            try:
                with _decode(row[self.stream.image_column]) as image:
                    pixels, _ = square_pixels(image, self.stream.transform)
            except Exception as error:  # whatever decoders raise
                bad += 1
                print(f"left out an image of the stream: {reason(error)}", file=sys.stderr)
                if bad > self.stream.max_corrupt_fraction * max(seen, 1000):
                    raise StreamError(
                        f"{bad} of the stream's first {seen} images cannot be used (the last: {reason(error)}): "
                        f"give a smaller dataset.image_size, or raise dataset.max_corrupt_fraction"
                    ) from error
                continue
            yield pixels, None if labels.column is None else labels.index(row[labels.column], f"example {seen}")

    def __iter__(self) -> Iterator[dict]:
        key, worker = self.key, get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        first = key.start + (0 if worker is None else worker.id)  # the DataLoader asks its workers in turn
        part = first % workers
        examples = self._examples(self._rows(key.rank * workers + part, key.world * workers))
        used = range((first - part) // workers * key.batch_size)
        one_for_all = part == key.start % workers
        for _ in bar(used, "going on in the stream", unit="image") if one_for_all else used:
            next(examples)
        for step in itertools.count(first, workers):
            pixels, labels = zip(*itertools.islice(examples, key.batch_size), strict=True)
            image = torch.from_numpy(np.stack(pixels))
            if self.flips:
                random = generator("flips", key.seed, key.stage, step, key.rank)
                image = flip(image, torch.rand(len(image), generator=random) < 0.5)
            batch = {"image": image, "step": step}
            yield batch if self.stream.labels.column is None else batch | {"label": torch.tensor(labels)}


class _Labels:
    """The classes that a column of labels holds; refuses in one line what is none."""

    def __init__(self, column: str | None, place: "_Place", count: int | None) -> None:
        self.column, self.place, self.count = column, place, count
        self.order: dict[str, int] | None = None

    def of_column(self, values: Sequence[Any]) -> list[int]:
        """The classes of all rows. Strings are numbered in the order of their sorted names."""
        if self.count is None and values and all(isinstance(value, str) for value in values):
            self.order = {name: k for k, name in enumerate(sorted(set(values)))}
            self.count = len(self.order)
        return self.of_rows(values)

    def of_rows(self, values: Sequence[Any]) -> list[int]:
        """The classes of the rows from the first."""
        classes = [self.index(value, f"row {i}") for i, value in enumerate(values)]
        if self.count is None:
            self.count = max(classes, default=0) + 1
        return classes

    def index(self, value: Any, row: str) -> int:
        """The class of one example."""
        what = f"dataset.label_column={self.column} of {shown(self.place.path)} holds {value!r:.80} in {row}"
        if self.order is not None and isinstance(value, str):
            return self.order[value]
        if value is None or (isinstance(value, int) and value == -1):
            raise StreamError(
                f"{what}, which stands for no label, as in many test sets: choose another dataset.split, or "
                f"dataset.label_column=null"
            )
        if isinstance(value, str):
            raise StreamError(
                f"{what}: labels of a stream, and of a column of several kinds, must be whole numbers; strings alone "
                f"are possible with dataset.streaming=false, or use dataset.label_column=null"
            )
        limit = MAX_CLASSES if self.count is None else self.count
        if not isinstance(value, int) or not 0 <= value < limit:
            raise StreamError(
                f"{what}: labels must be whole numbers from 0 to {limit - 1}: choose another column, or "
                f"dataset.label_column=null"
            )
        return int(value)


@dataclass(frozen=True)
class _Place:
    """Where a dataset is: by its name on the hub, or in a directory."""

    path: str
    subset: str | None
    revision: str | None
    split: str


def _expanded(path: Any) -> str:
    """The name on the hub, or the path with ~ expanded."""
    expanded = location("path", path, "give a name on the hub, or a folder, dataset.path=<name>")
    return str(expanded) if str(path).startswith("~") else str(path)


def _open(place: _Place, streaming: bool, image_column: str, label_column: str | None) -> tuple[Any, list[str]]:
    """A map-style or iterable dataset, its images left encoded; and what a stream is known by."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "dataset=huggingface needs the datasets library: pip install 'pdistill[huggingface]'"
        ) from error
    try:
        dataset, identity = _load(place, streaming)
    except Exception as error:  # the hub's, the file system's and the builders' own
        raise UserError(
            f"dataset.path={shown(place.path)} (dataset.subset={place.subset}, dataset.split={place.split}) cannot be "
            f"loaded: {reason(error)[:300]}"
        ) from error
    if dataset.features is None:
        raise UserError(
            f"dataset.path={shown(place.path)} does not say what its columns hold: use dataset.streaming=false"
        )
    columns = list(dataset.features)
    for key, column in {"image_column": image_column, "label_column": label_column}.items():
        if column is not None and column not in columns:
            raise UserError(
                f"dataset.{key}={column} is not a column of {shown(place.path)}: choose among {', '.join(columns)}"
            )
    if not isinstance(dataset.features[image_column], datasets.Image):
        raise UserError(
            f"dataset.image_column={image_column} of {shown(place.path)} holds no images: "
            f"{dataset.features[image_column]}"
        )
    return dataset.cast_column(image_column, datasets.Image(decode=False)), identity


def _load(place: _Place, streaming: bool) -> tuple[Any, list[str]]:
    import datasets

    if Path(place.path, "dataset_info.json").exists() or Path(place.path, "dataset_dict.json").exists():
        dataset = datasets.load_from_disk(place.path)
        if isinstance(dataset, datasets.DatasetDict):
            if place.split not in dataset:
                raise ValueError(f"there is no such split: choose among {', '.join(map(str, dataset))}")
            dataset = dataset[place.split]
        if not streaming:
            return dataset, []
        files = [Path(file["filename"]) for file in dataset.cache_files]
        identity = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        return dataset.to_iterable_dataset(num_shards=min(64, len(dataset))), identity
    named: dict[str, Any] = {"name": None if place.subset is None else str(place.subset), "revision": place.revision}
    if not streaming:
        return datasets.load_dataset(place.path, split=place.split, **named), []
    builder = datasets.load_dataset_builder(place.path, **named)
    files = builder.config.data_files or {}
    chosen = [files[place.split]] if place.split in files else list(files.values())
    return builder.as_streaming_dataset(split=place.split), [
        f"{Path(file).name} {origin}" for of_split in chosen for file, origin in _origins(of_split)
    ]


def _origins(files: Any) -> Iterator[tuple[str, Any]]:
    """Each file with its commit on the hub, its ETag, or its time of modification."""
    return zip(files, getattr(files, "origin_metadata", [()] * len(files)), strict=True)


def _first(dataset: Any, count: int, place: _Place) -> list[dict]:
    """The first rows of a stream."""
    try:
        rows = dataset.take(count)
        return list(bar(rows, "reading the stream's first images", count, unit="image"))
    except Exception as error:  # the network's, the file system's and the readers' own
        raise UserError(f"dataset.path={shown(place.path)} cannot be read: {reason(error)[:300]}") from error


def _identity_of_rows(dataset: Any, image_column: str) -> Iterator[str]:
    """What names the content of a map-style dataset: its own fingerprint, and the files that hold it."""
    yield dataset._fingerprint
    for file in dataset.cache_files:
        yield identity_of(Path(file["filename"]))
    for chunk in dataset.data.column(image_column).chunks:  # images that are not in those files but named by them
        missing = chunk.field("bytes").is_null()
        if missing.true_count:
            paths = chunk.field("path").filter(missing).to_pylist()
            for path in bar(paths, "looking for the images' files", unit="file"):
                yield identity_of(Path(path)) if path and Path(path).exists() else str(path)


def _content_of(encoded: dict | None) -> str:
    """Names one encoded image."""
    if encoded is None:
        return "none"
    if encoded["bytes"] is not None:
        return hashlib.sha256(encoded["bytes"]).hexdigest()
    path = encoded["path"]
    return identity_of(Path(path)) if Path(path).exists() else path


def _decode(encoded: dict | None) -> Image.Image:
    """The image, not yet loaded. Raises ValueError where there is none."""
    if encoded is None or (encoded["bytes"] is None and not encoded["path"]):
        raise ValueError("there is no image")
    try:
        if encoded["bytes"] is not None:
            return Image.open(io.BytesIO(encoded["bytes"]))
        if "://" in encoded["path"]:
            import fsspec

            opened: Any = fsspec.open(encoded["path"])
            with opened as remote:
                return Image.open(io.BytesIO(remote.read()))
        return Image.open(encoded["path"])
    except UnidentifiedImageError as error:
        raise ValueError("is no image, or of a format that cannot be decoded here") from error
