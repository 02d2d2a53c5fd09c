"""A stream of examples, read while training: endless, shuffled, shared among ranks and workers."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from pdistill.bars import bar
from pdistill.dataset.batches import BatchKey, flip
from pdistill.dataset.columns import Labels, StreamError, decode
from pdistill.dataset.images import ImageSet
from pdistill.dataset.pixels import Transform, square_pixels
from pdistill.dataset.settings import reason
from pdistill.randomness import generator, seed_of

READ_AHEAD = 32  # examples asked of a stream at once


@dataclass(frozen=True)
class Stream:
    """A stream of encoded examples, and how they become images and labels."""

    rows: Any
    """The `datasets.IterableDataset`."""
    image_column: str
    labels: Labels
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
                with decode(row[self.stream.image_column]) as image:
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
