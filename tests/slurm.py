"""A Slurm of two nodes on this machine, for a test: Debian's slurm-wlm and munge, run by root, in a directory."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
CONFIGURATION = """
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmctldPort=27917
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[27921-27922] CPUs=2 RealMemory=1000
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no such Slurm here; None where there can."""
    if os.getuid() != 0:
        return "a Slurm of one's own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"a Slurm of one's own needs the packages slurm-wlm and munge (no {', '.join(absent)})" if absent else None


@contextlib.contextmanager
def cluster(home: Path) -> Iterator[dict[str, str]]:
    """Gives the environment that srun and the others need, once both nodes are idle."""
    (home / "state").mkdir()
    (home / "slurm.conf").write_text(CONFIGURATION.format(host=socket.gethostname(), home=home))
    (home / "munge.key").write_bytes(os.urandom(128))
    (home / "munge.key").chmod(0o400)
    variables = {"SLURM_CONF": str(home / "slurm.conf")}
    munged = ["munged", "-F", "--force", f"--key-file={home}/munge.key", f"--socket={home}/munge.socket"]
    munged += [f"--pid-file={home}/munge.pid", f"--log-file={home}/munge.log", f"--seed-file={home}/munge.seed"]
    daemons = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    options = {"env": os.environ | variables, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running: list[subprocess.Popen] = []
    try:
        for command in daemons:
            running.append(subprocess.Popen(command, **options))
            time.sleep(1.5)
        deadline = time.monotonic() + 30
        while "idle" not in _nodes(variables):
            assert time.monotonic() < deadline, (home / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield variables
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(30)


def _nodes(variables: dict[str, str]) -> str:
    command = ["sinfo", "--noheader", "--format=%T %D", "--states=idle"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    return done.stdout if "2" in done.stdout else ""
