"""Files that are whole or absent, locks, digests, and the directory of caches."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pdistill.errors import UserError
from pdistill.reading import json_of, text_of


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end it is flushed to the disk and takes `path`'s place.

    Whoever reads `path` sees the old file or the new one, after a crash as well. If the block raises, the old one
    stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """An empty directory beside `directory` to fill; at the end it takes `directory`'s place."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    replaced = directory.with_name(f".{directory.name}.{os.getpid()}.replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        if directory.exists():
            directory.rename(replaced)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def remove_partial(directory: Path) -> None:
    """Removes what killed processes left in a directory and below it: half written, or replaced and not yet deleted."""
    for path in [*directory.rglob(".*.partial"), *directory.rglob(".*.replaced")]:
        if path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """The file, whole or not at all; of names that are no UTF-8 the odd bytes as \\udce9."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: object) -> None:
    """Indented JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path, default: Any = None, cure: str = "delete it, and the command makes it again") -> Any:
    """The content of a JSON file; `default` where there is none. Raises UserError, with the cure, if it is damaged.

    What counts as damaged, hostile content included, is in `reading`.
    """
    try:
        return json_of(text_of(path))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {cure}") from error


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[IO | None]:
    """Holds the lock file `path` against other processes; gives None where it cannot be taken without waiting.

    In a directory that may not be written to, whatever is there is complete, and nothing is locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    except OSError:
        if not path.parent.is_dir():
            raise
        yield None
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield lock


def cache_directory() -> Path:
    """Where caches of images, extractors and statistics are kept: $PDISTILL_CACHE, or ~/.cache/pdistill.

    Raises UserError where neither is known.
    """
    if named := os.environ.get("PDISTILL_CACHE"):
        return Path(named).expanduser()
    try:
        return Path.home() / ".cache" / "pdistill"
    except RuntimeError as error:
        raise UserError("there is no home directory to keep caches in: set PDISTILL_CACHE=<directory>") from error


def digest_of(lines: Iterable[str]) -> str:
    """16 hexadecimal digits that name these lines."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def digest_of_file(path: Path) -> str:
    """16 hexadecimal digits that name the file's content."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]
