"""Images that the `datasets` library loads: from the hub by name, from a folder, or saved to disk.

A map-style dataset goes through the cache once, as folders do. A stream is read while training; only its first images
are cached, and figures are measured against those.
"""

import io
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from pdistill.dataset import ImageSet
from pdistill.dataset.batches import flip
from pdistill.dataset.cache import Source, cached_images, crop_and_resize, digest_of, one_line
from pdistill.errors import UserError
from pdistill.randomness import generator, seed_of

READ_AHEAD = 32  # examples asked of a stream at once


def load(
    path: str,
    image_size: int,
    image_channels: int = 3,
    split: str = "train",
    subset: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    streaming: bool = False,
    reference_images: int = 10000,
    shuffle_buffer: int = 10000,
    flips: bool = True,
    resize: str = "lanczos",
    max_corrupt_fraction: float = 0.001,
    cache: str | None = None,
) -> ImageSet:
    """The images of a split, with labels if `label_column` is given; see `image_cache.cached_images` for the rest.

    `streaming` trains on the stream, shuffled within `shuffle_buffer` examples, and measures against its first
    `reference_images`. Raises UserError where the library is missing, or the dataset, split or column is not there.
    """
    dataset = _open(path, subset, split, streaming, image_column, label_column)
    rows = list(dataset.take(reference_images)) if streaming else dataset
    key = dataset._fingerprint if not streaming else digest_of([str(path), str(subset), split, str(len(rows))])
    labels = None
    if label_column:
        labels = [row[label_column] for row in rows] if streaming else rows[label_column]
    source = Source(
        name=f"huggingface:{Path(path).name}",
        key=key,
        names=[f"row {i} of {path}" for i in range(len(rows))],
        open=lambda i: _decode(rows[i][image_column]),
        labels=labels,
    )
    images, labels, digest = cached_images(source, image_size, image_channels, resize, max_corrupt_fraction, cache)
    if not streaming:
        return ImageSet(source.name, images, labels, flips, digest)
    classes = getattr(dataset.features[label_column], "num_classes", None) if label_column else None
    options = (image_column, label_column, image_size, image_channels, resize, max_corrupt_fraction, shuffle_buffer)
    return StreamedImageSet(source.name, images, labels, flips, digest, dataset, options, classes)


@dataclass(frozen=True)
class StreamedImageSet(ImageSet):
    """`images` are the stream's first, for figures; training reads `stream`."""

    stream: Any = None
    options: tuple = ()
    classes: int | None = None

    @property
    def num_classes(self) -> int:
        return super().num_classes if self.classes is None else self.classes

    def batches(self, batch_size: int, seed: int, stage: int, rank: int = 0, world: int = 1, start: int = 0):
        """See ImageSet.batches."""
        return StreamedBatches(self.stream, *self.options, self.flips, batch_size, seed, stage, rank, world, start)


class StreamedBatches(IterableDataset):
    """Batches of an endless, shuffled stream; the one at a step is a function of (seed, stage, step, rank).

    Each rank's workers share the stream without overlap or loss, shard by shard where there are enough, else
    example by example. A restart reads past what was used before. The number of workers is part of the key, too.
    """

    def __init__(
        self,
        stream,
        image_column: str,
        label_column: str | None,
        image_size: int,
        image_channels: int,
        resize: str,
        max_corrupt_fraction: float,
        shuffle_buffer: int,
        flips: bool,
        batch_size: int,
        seed: int,
        stage: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        self.stream = stream.shuffle(seed=seed_of(seed, stage) % 2**32, buffer_size=shuffle_buffer)
        self.image_column, self.label_column = image_column, label_column
        self.crop = (image_size, image_channels, resize)
        self.max_corrupt_fraction = max_corrupt_fraction
        self.flips, self.batch_size = flips, batch_size
        self.seed, self.stage, self.rank, self.world, self.start = seed, stage, rank, world, start

    def _rows(self, part: int, parts: int) -> Iterator[dict]:
        """This part of the stream, epoch after epoch."""
        from datasets.distributed import split_dataset_by_node

        mine = split_dataset_by_node(self.stream, part, parts)
        for epoch in range(2**31):
            mine.set_epoch(epoch)
            found = False
            for rows in mine.iter(READ_AHEAD):  # iter, not __iter__, which would split once more among workers
                found = True
                yield from (dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True))
            if not found:
                raise UserError(f"the stream has fewer than {parts} examples: use fewer devices or num_workers")

    def _examples(self, rows: Iterator[dict]) -> Iterator[tuple[np.ndarray, int | None]]:
        bad = 0
        for seen, row in enumerate(rows, 1):
            try:
                with _decode(row[self.image_column]) as image:
                    pixels = crop_and_resize(image, *self.crop)
            except Exception as error:
                bad += 1
                print(f"left out an image of the stream: {one_line(error)}", file=sys.stderr)
                if bad > self.max_corrupt_fraction * max(seen, 1000):
                    raise UserError(
                        f"{bad} of the stream's first {seen} images cannot be used (the last: {one_line(error)}): "
                        f"give a smaller dataset.image_size, or raise dataset.max_corrupt_fraction"
                    ) from error
                continue
            yield pixels, None if self.label_column is None else row[self.label_column]

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        first = self.start + (0 if worker is None else worker.id)  # the DataLoader asks its workers in turn
        part = first % workers
        rows = self._rows(self.rank * workers + part, self.world * workers)
        examples = self._examples(rows)
        for _ in range((first - part) // workers * self.batch_size):
            next(examples)
        for step in itertools.count(first, workers):
            pixels, labels = zip(*itertools.islice(examples, self.batch_size), strict=True)
            image = torch.from_numpy(np.stack(pixels))
            if self.flips:
                image = flip(image, generator(self.seed, self.stage, step, self.rank, 1))
            batch = {"image": image, "step": step}
            yield batch if self.label_column is None else batch | {"label": torch.tensor(labels)}


def _open(path: str | None, subset: str | None, split: str, streaming: bool, image_column: str, label_column: str):
    """A map-style or iterable dataset, its images left encoded."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "dataset=huggingface needs the datasets library: pip install 'pdistill[huggingface]'"
        ) from error
    if path is None:
        raise UserError("dataset.path is missing: a name on the hub, or a folder, dataset.path=<name>")
    try:
        if Path(path, "dataset_info.json").exists() or Path(path, "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(path)
            dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
            dataset = dataset.to_iterable_dataset(num_shards=min(64, len(dataset))) if streaming else dataset
        else:
            dataset = datasets.load_dataset(path, subset, split=split, streaming=streaming)
    except Exception as error:  # the hub's, the file system's and the builders' own
        raise UserError(
            f"dataset.path={path} (dataset.subset={subset}, dataset.split={split}) cannot be loaded: "
            f"{one_line(error)[:300]}"
        ) from error
    columns = dataset.column_names or []
    for key, column in {"image_column": image_column, "label_column": label_column}.items():
        if column and column not in columns:
            raise UserError(f"dataset.{key}={column} is not a column of {path}: choose among {', '.join(columns)}")
    if not isinstance(dataset.features[image_column], datasets.Image):
        raise UserError(
            f"dataset.image_column={image_column} of {path} holds no images: {dataset.features[image_column]}"
        )
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def _decode(encoded: dict) -> Image.Image:
    return Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"])
