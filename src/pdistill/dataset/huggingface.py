"""Images that the `datasets` library loads: from the hub by name, from a folder, or saved to disk.

A map-style dataset goes through the cache once, as folders do. A stream is read while training; only its first images
are cached, and metrics are measured against those.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdistill.bars import bar
from pdistill.checks import whole
from pdistill.dataset.cache import Source, cached_images, identity_of
from pdistill.dataset.columns import Labels, decode
from pdistill.dataset.images import ImageSet
from pdistill.dataset.pixels import Transform
from pdistill.dataset.settings import flag, fraction, location, reason, shown
from pdistill.dataset.stream import Stream, StreamedImageSet
from pdistill.errors import UserError
from pdistill.files import digest_of


@dataclass(frozen=True)
class Place:
    """Where a dataset is: by its name on the hub, or in a directory."""

    path: str
    subset: str | None
    revision: str | None
    split: str


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
    place = Place(_expanded(path), subset, revision, str(split))
    image, label = str(image_column), None if label_column is None else str(label_column)
    dataset, identity = _open(place, streaming, image, label)
    labels = Labels(label, place.path, getattr(dataset.features.get(label), "num_classes", None))
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
        open=lambda i: decode(rows[i][image]),
        labels=classes,
        classes=labels.count,
    )
    cached = cached_images(source, transform, flips=flips, max_corrupt_fraction=max_corrupt_fraction, cache=cache)
    if not streaming:
        return cached
    digest = digest_of([cached.fingerprint, *identity])
    stream = Stream(dataset, image, labels, transform, max_corrupt_fraction, shuffle_buffer)
    return StreamedImageSet(cached.name, cached.images, cached.labels, flips, digest, cached.classes, stream=stream)


def _expanded(path: Any) -> str:
    """The name on the hub, or the path with ~ expanded."""
    expanded = location("path", path, "give a name on the hub, or a folder, dataset.path=<name>")
    return str(expanded) if str(path).startswith("~") else str(path)


def _open(place: Place, streaming: bool, image_column: str, label_column: str | None) -> tuple[Any, list[str]]:
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


def _load(place: Place, streaming: bool) -> tuple[Any, list[str]]:
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


def _first(dataset: Any, count: int, place: Place) -> list[dict]:
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
