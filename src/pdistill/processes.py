"""Which process this is among several: the one place that knows.

Processes are started by torchrun, by a cluster's launcher (srun, mpirun, jsrun), by Lightning for further devices, or
not at all. Before torch.distributed is initialised the launcher's environment says who is who; afterwards torch does.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pdistill.errors import UserError, first_line

if TYPE_CHECKING:
    import subprocess

    import torch

# Of torchrun, Slurm, Open MPI, other MPIs, and IBM's LSF.
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK")


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
    for variable in RANK_VARIABLES:
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return int(os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("NODE_RANK", "0") != "0")


def world_size() -> int:
    """How many processes work together; 1 before they have met."""
    distributed = _distributed()
    return distributed.get_world_size() if distributed else 1


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
