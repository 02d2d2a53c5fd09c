"""An lmdb database, read by a process of its own: see `lmdb_reader`."""

import json
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from pdistill.dataset import lmdb_reader
from pdistill.dataset.settings import shown
from pdistill.errors import UserError

PATIENCE = 120  # seconds for an answer; a slow disk needs some
PART = 1024**2  # bytes


class Database:
    """Of a folder that holds data.mdb. Raises UserError where it is damaged; several threads may ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        command = [sys.executable, "-P", lmdb_reader.__file__, os.fspath(self.folder)]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(  # in a session of its own: Ctrl-C is not for it
            command, bufsize=0, stdin=pipe, stdout=pipe, stderr=none, start_new_session=True
        )
        told = json.loads(self._asked(b"i"))
        self.entries, self.transactions = int(told["entries"]), int(told["transactions"])
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait()

    def keys(self) -> Iterator[bytes]:
        """All of them, in their order. Nothing else may be asked meanwhile."""
        with self.lock:
            self._ask(b"k")
            while key := self._answer():
                yield key

    def get(self, key: bytes) -> bytes:
        """The value of a key that is there."""
        return self._asked(b"g" + key)

    def _asked(self, request: bytes) -> bytes:
        with self.lock:
            self._ask(request)
            return self._answer()

    def _ask(self, request: bytes) -> None:
        pipe = self._pipe(self.process.stdin)
        try:
            pipe.write(struct.pack("<Q", len(request)) + request)
        except BrokenPipeError:
            if not select.select([self._pipe(self.process.stdout)], [], [], 0)[0]:  # it may have said why
                raise self._damaged("the process that reads it ended") from None

    def _answer(self) -> bytes:
        kind = self._read(1)
        length = struct.unpack("<Q", self._read(8))[0]
        content = self._read(length)
        if kind != b"+":
            raise self._damaged(content.decode("utf-8", "backslashreplace"))
        return content

    def _read(self, length: int) -> bytes:
        pipe, content = self._pipe(self.process.stdout), bytearray()
        while len(content) < length:
            if not select.select([pipe], [], [], PATIENCE)[0]:
                raise self._damaged(f"the process that reads it gave no answer in {PATIENCE} s")
            part = os.read(pipe.fileno(), min(PART, length - len(content)))
            if not part:
                raise self._damaged("the process that reads it ended")
            content += part
        return bytes(content)

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None  # both are pipes
        return pipe

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{shown(self.folder)} is damaged ({shown(why)[:200]}): export or copy it again")
