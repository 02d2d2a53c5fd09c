"""What goes wrong inside of a process: called in it before the command begins."""

import os
import signal
import sys
import time

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


def _is_change(event: str, arguments: tuple) -> bool:
    """Whether an audit event is about to change something on the disk."""
    if event == "open":
        path, mode, flags = arguments
        writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR)) or any(c in (mode or "") for c in "wax+")
        return writes and not str(path).startswith(("/dev/", "/proc/"))
    return event in CHANGES


def kill_before_change(number: int) -> None:
    """SIGKILL just before the `number`-th change of a file; the log's last line says which it was."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if _is_change(event, arguments):
            seen += 1
            if seen == number:
                os.write(2, f"killed before {event} {arguments[:2]}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_changes(file: str) -> None:
    """Leaves the number of changes in `file`."""
    seen, descriptor = 0, os.open(file, os.O_WRONLY | os.O_CREAT)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if _is_change(event, arguments):
            seen += 1
            os.pwrite(descriptor, str(seen).encode(), 0)

    sys.addaudithook(hook)


def out_of_memory(stage: int, kind: str) -> None:
    """A network that finds no memory in the second update of a stage, as torch's allocators say it."""
    import torch

    from pdistill.training.module import DenoisingModule

    training_step = DenoisingModule.training_step

    def step(self, batch, batch_idx):
        if self.stage_index == stage and int(batch["step"]) == 1:
            if kind == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
            torch.empty(2**62, dtype=torch.uint8)  # what the CPU's allocator says
        return training_step(self, batch, batch_idx)

    DenoisingModule.training_step = step


def clock_jumps(seed: int) -> None:
    """The wall clock goes to and fro by years, from call to call."""
    import random

    jumps, real, real_ns = random.Random(seed), time.time, time.time_ns
    time.time = lambda: real() + jumps.uniform(-3e8, 3e8)
    time.time_ns = lambda: real_ns() + int(jumps.uniform(-3e17, 3e17))


def caches_in(directory: str) -> None:
    """Caches elsewhere than those of the other commands."""
    os.environ["PDISTILL_CACHE"] = directory
