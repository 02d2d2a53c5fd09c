"""Whether those processes were started that the configuration asks for: otherwise they would wait for each other."""

import socket
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from pdistill import processes
from pdistill.errors import UserError

SECONDS_FOR_FILES = 60.0  # network file systems show new files late


def _launched(what: str) -> int:
    """Of `${launched:nodes}` and `${launched:processes_per_node}`; 1 where no launcher started this process."""
    there = processes.launched()
    if there is None:
        return 1
    return there.nodes if what == "nodes" else there.processes // there.nodes


OmegaConf.register_new_resolver("launched", _launched, replace=True)


def check_trainer(trainer: Any, devices: int | None = None) -> None:
    """Raises UserError unless the processes that `cfg.trainer` asks for were started, or Lightning will start them.

    `devices` are those on this node; by default what the configuration says, where that is a number.
    """
    _check_srun()
    nodes, said = trainer.get("num_nodes", 1), trainer["devices"]
    count = said if devices is None else devices
    if count != -1:
        check_counts(nodes, count, f"trainer.num_nodes={nodes} trainer.devices={said}")


def check_counts(nodes: int, devices: int, asked: str) -> None:
    """Raises UserError unless as many processes were started as nodes times devices; `asked` names the keys.

    Where no launcher did, Lightning will start those of one machine.
    """
    there = processes.launched()
    if there is None:
        _check_alone(nodes, devices, asked)
        return
    each, rest = divmod(there.processes, there.nodes)
    if rest:
        raise UserError(
            f"{there.by} started {there.processes} processes on {there.nodes} nodes: start as many on every node"
        )
    if (nodes, devices) != (there.nodes, each):
        raise UserError(
            f"{there.by} started {_counted(there.nodes, each)}, and {asked} asks for {_counted(nodes, devices)}: "
            f"give one what the other has, a process for each device"
        )


def _counted(nodes: int, each: int) -> str:
    return f"{each} process{'es' * (each > 1)} on {'one node' if nodes == 1 else f'each of {nodes} nodes'}"


def _check_alone(nodes: int, devices: int, asked: str) -> None:
    if nodes > 1 and not processes.is_started_by_hand():
        raise UserError(
            f"{asked} asks for {nodes} nodes, and nothing has started processes on them: start this with srun, or with "
            f"torchrun --nnodes {nodes} on each (docs/clusters.md)"
        )
    if nodes * devices > 1 and processes.in_allocation():
        raise UserError(
            f"{asked} asks for {nodes * devices} processes in a job of Slurm, which starts them itself: "
            f"put srun before the command (docs/clusters.md)"
        )


def _check_srun() -> None:
    """Raises UserError for trainer=slurm where srun did not start this process: it would be alone."""
    chosen = HydraConfig.get().runtime.choices.get("trainer") if HydraConfig.initialized() else None
    if chosen == "slurm" and processes.launched() is None:
        raise UserError(
            "trainer=slurm is for processes that srun starts, and it did not start this one: put srun before the "
            "command (docs/clusters.md), or use trainer=gpu or trainer=ddp"
        )


def check_seen(strategy: Any) -> None:
    """Raises UserError where Lightning does not know that a launcher started several processes, and would do so too."""
    there, environment = processes.launched(), getattr(strategy, "cluster_environment", None)
    if there is None or there.processes == 1 or environment is None or environment.creates_processes_externally:
        return
    cure = "install mpi4py" if there.by == "mpirun" else "call the job neither bash nor interactive"
    raise UserError(f"{there.by} started {there.processes} processes, and Lightning does not know it: {cure}")


def check_shared(directory: Path) -> None:
    """Raises UserError on every process where one of them does not see the directory that the main one has made."""
    deadline = time.monotonic() + SECONDS_FOR_FILES
    while not directory.exists() and time.monotonic() < deadline:
        time.sleep(1)
    seen = processes.gather((directory.exists(), socket.gethostname()))
    if blind := sorted({host for exists, host in seen if not exists}):
        raise UserError(
            f"{directory} is not to be seen from {', '.join(blind)}: several nodes need an output_root=<directory> on "
            f"a file system that they share"
        )
