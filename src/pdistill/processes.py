"""Which process this is among several: the one place that knows.

Processes are started by torchrun, by a cluster's launcher (srun, mpirun, jsrun), by Lightning for further devices, or
not at all. Before torch.distributed is initialised the launcher's environment says who is who; afterwards torch does.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdistill.errors import UserError, first_line

if TYPE_CHECKING:
    import subprocess

    import torch

# Of torchrun, Slurm, Open MPI, other MPIs, and IBM's LSF.
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK")


@dataclass(frozen=True)
class Launched:
    """The processes that a launcher started together."""

    by: str
    nodes: int
    processes: int
    """On all nodes."""


def launched() -> Launched | None:
    """What started this process and its like; None where nothing did, and Lightning starts those of one machine.

    A batch script of Slurm is no such process: srun starts them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        world = _number("WORLD_SIZE") or 1
        return Launched("torchrun", max(1, world // (_number("LOCAL_WORLD_SIZE") or world)), world)
    if _number("SLURM_PROCID") is not None and _number("SLURM_NTASKS") and not in_batch_script():
        nodes = _number("SLURM_STEP_NUM_NODES") or _number("SLURM_NNODES") or 1
        return Launched("srun", nodes, _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS") or 1)
    if world := _number("OMPI_COMM_WORLD_SIZE") or _number("PMI_SIZE"):
        here = _number("OMPI_COMM_WORLD_LOCAL_SIZE") or _number("MPI_LOCALNRANKS") or world
        return Launched("mpirun", max(1, world // here), world)
    return None


def in_batch_script() -> bool:
    """Whether Slurm started this process as, or from, a batch script, and srun did not."""
    return (
        os.environ.get("ENVIRONMENT") == "BATCH" and "SLURM_JOB_ID" in os.environ and _number("SLURM_STEP_ID") is None
    )


def in_allocation() -> bool:
    """Whether Slurm has counted tasks that nothing has started yet: Lightning would wait for them."""
    waits = os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")  # Lightning's rule
    return waits and "SLURM_NTASKS" in os.environ and "SLURM_STEP_ID" not in os.environ


def is_started_by_hand() -> bool:
    """Whether a user started this process on one of several nodes, as Lightning's documentation says."""
    return "NODE_RANK" in os.environ and "MASTER_ADDR" in os.environ


def _number(variable: str) -> int | None:
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else None


def _distributed() -> Any:
    """torch.distributed if it is initialised, else None; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed


def rank() -> int:
    """0 for the main process. Among those that Lightning starts, before they have met, 1 stands for any other."""
    if distributed := _distributed():
        return distributed.get_rank()
    if of_launcher := next((n for n in map(_number, RANK_VARIABLES) if n is not None), 0):
        return of_launcher
    return int(os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("NODE_RANK", "0") != "0")


def world_size() -> int:
    """How many processes work together; 1 before they have met."""
    distributed = _distributed()
    return distributed.get_world_size() if distributed else 1


_followers: list[Any] = []


def remember_started(launcher: Any) -> None:
    """Of Lightning's launcher: the processes that it started for further devices, which stop when this one does."""
    _followers.extend(getattr(launcher, "procs", []))


def pass_on(number: int) -> None:
    """Sends a signal to the processes that this one started."""
    for process in _followers:
        if process.poll() is None:
            process.send_signal(number)


def is_main() -> bool:
    """True in the one process that writes files and talks."""
    return rank() == 0


def barrier() -> None:
    """Waits until every process has come here."""
    if distributed := _distributed():
        distributed.barrier()


def gather(mine: object) -> list[Any]:
    """What every process brings, in the order of ranks, on every process."""
    distributed = _distributed()
    if not distributed:
        return [mine]
    everyones: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyones, mine)
    return everyones


def of_main(value: object) -> Any:
    """The main process's `value`, on every process."""
    distributed = _distributed()
    if not distributed:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


# A process that died leaves others waiting for it, with NCCL for half an hour: those that were started by one that is
# watched, or that watch it, end soon after.

GONE = "another process of this run is gone; the same command continues from the last checkpoint"
SECONDS_TO_END = 20.0  # in which the others may end by themselves, with a line that says more
SECONDS_BETWEEN_LOOKS = 0.5
_parent: int | None = None  # of a process that another one of the run has started


def is_orphan() -> bool:
    """Whether this is the process that speaks for those that the main process started, which is dead."""
    return _parent is not None and os.environ.get("LOCAL_RANK") == "1" and _parent_is_dead()


def _parent_is_dead() -> bool:
    if os.getppid() == _parent:
        time.sleep(0.2)  # its connections end a moment before it does
    return os.getppid() != _parent


def watch(children: "Sequence[subprocess.Popen[Any]]") -> None:
    """Ends this process in one line soon after one of the `children` failed; in a child, after its parent is gone."""
    global _parent
    if not children:
        _parent = os.getppid()
    threading.Thread(target=_look, args=(children,), daemon=True, name="watch").start()


def _look(children: "Sequence[subprocess.Popen[Any]]") -> None:
    while not (any(child.poll() for child in children) or (not children and _parent_is_dead())):
        if children and all(child.poll() == 0 for child in children):
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)
    time.sleep(SECONDS_TO_END)
    if children or os.environ.get("LOCAL_RANK") == "1":
        ended = {f"rank {k + 1} ended with {child.poll()}" for k, child in enumerate(children) if child.poll()}
        print(f"error: {GONE} ({', '.join(sorted(ended)) or 'the main one'})", file=sys.stderr, flush=True)
    for child in children:
        child.kill()
    os._exit(1)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_memory() -> None:
    """Lets this process keep what it frees, so that the next update finds it: with glibc, else nothing happens.

    Where processes exchange gradients these lie in buckets, which were made first. So the end of the heap is free after
    each update, goes back to the system, and is handed out again page by page (`benchmarks/scaling.py`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def device_of(name: str) -> "torch.device":
    """The device of that name; "auto" is CUDA where there is one. Raises UserError where it is not available."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(
            f"device={name} is not available here ({first_line(error)}): use device=auto or device=cpu"
        ) from error
