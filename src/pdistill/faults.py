"""What a machine does to a run, in one line: no memory, no room on the disk, a process that died."""

from collections.abc import Iterator
from contextlib import contextmanager

from pdistill import processes
from pdistill.errors import UserError, first_line

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
NO_ROOM = ("no space left on device", "disk quota exceeded", "read-only file system", "file too large")
LOST = ("closed by peer", "connection reset", "gloo", "nccl", "broken pipe", "recvfrom", "store is not available")


class Fault(UserError):
    """Of one process alone, which tells of it itself, whatever its rank."""

    exit_code = 1


class Lost(UserError):
    """Another process of the run is gone."""

    exit_code = 1


@contextmanager
def in_words(where: str, less_memory: str) -> Iterator[None]:
    """Turns a fault of the machine in the block into a UserError that begins with `where`; other errors pass.

    `less_memory` is what to do where the memory does not suffice.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        text = f"{type(error).__name__} {error}".lower()
        line = first_line(error)
        if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
            raise Fault(f"{where}: out of memory ({line}): {less_memory}") from error
        if any(words in text for words in NO_ROOM):
            raise Fault(f"{where}: {line}: make room, and give the same command again") from error
        if processes.world_size() > 1 and any(words in text for words in LOST):
            kind = Fault if processes.is_orphan() else Lost
            raise kind(f"{where}: {processes.GONE} ({line})") from error
        raise
