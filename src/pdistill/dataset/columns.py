"""What the rows of a `datasets` table hold: encoded images, and labels. Nothing here needs that library."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from pdistill.dataset.pixels import open_picture
from pdistill.dataset.settings import shown
from pdistill.dataset.zips import MOST_BYTES
from pdistill.errors import UserError
from pdistill.reading import regular

SCHEMES = {"hf", "https", "http", "zip", "tar", "gzip", "file"}  # of addresses in a table
MAX_CLASSES = 100_000  # larger labels are some other number: the network has a row for each class


class StreamError(UserError):
    """A UserError that stays one line when it comes out of a DataLoader's worker, which wraps a trace around it."""

    def __init__(self, message: str) -> None:
        lines = message.strip().splitlines() or [""]
        super().__init__(lines[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Labels:
    """The classes that a column of labels holds; refuses in one line what is none."""

    def __init__(self, column: str | None, path: str, count: int | None) -> None:
        self.column, self.path, self.count = column, path, count
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
        what = f"dataset.label_column={self.column} of {shown(self.path)} holds {value!r:.80} in {row}"
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


def _fetched(address: str) -> bytes:
    """What a table names by an address: of the hub, the web, or inside of an archive there."""
    import fsspec

    schemes = {scheme for part in address.split("::") for scheme in [part.partition("://")[0]] if "://" in part}
    if not schemes <= SCHEMES:
        raise ValueError(f"addresses of {', '.join(sorted(schemes - SCHEMES))} are not read")
    opened: Any = fsspec.open(address)
    with opened as remote:
        content = remote.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return content


def decode(encoded: dict | None) -> Image.Image:
    """The image, not yet loaded. Raises ValueError where there is none."""
    if encoded is None or (encoded["bytes"] is None and not encoded["path"]):
        raise ValueError("there is no image")
    try:
        if encoded["bytes"] is not None:
            return open_picture(io.BytesIO(encoded["bytes"]))
        if "://" in encoded["path"]:
            return open_picture(io.BytesIO(_fetched(encoded["path"])))
        regular(Path(encoded["path"]))
        return open_picture(encoded["path"])
    except UnidentifiedImageError as error:
        raise ValueError("is no image, or of a format that cannot be decoded here") from error
