"""Command lines in processes that are forked from one that has imported the large libraries.

`python distill.py` imports for seconds before it works, and the tests start such processes by the hundred. The fork
server of multiprocessing imports the libraries once, and nothing of this project. Each process then runs the script as
`python script.py` does, with a command line, a directory, an environment and streams of its own.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "hydra",
        "diffusers.models.unets.unet_2d_condition",
        "lightning.pytorch.callbacks",
        "torch_fidelity.metric_isc",
        "torchmetrics.image.fid",
        "sklearn.datasets",
        "matplotlib.figure",
    ]
)


class Command:
    """A running script (its path) or module (`-m`), as tests know it from subprocess.Popen; its output is collected."""

    def __init__(self, program: Path | str, *words: str, cwd: Path, env: dict[str, str]) -> None:
        (out, self._out), (err, self._err) = (CONTEXT.Pipe(duplex=False) for _ in range(2))
        self._process = CONTEXT.Process(target=_run, args=(program, words, cwd, env, self._out, self._err))
        self._process.start()
        self._out.close(), self._err.close()
        self._texts = dict.fromkeys((out, err), "")
        self._readers = [threading.Thread(target=self._read, args=(pipe,), daemon=True) for pipe in self._texts]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: Connection) -> None:
        with pipe, open(pipe.fileno(), closefd=False, errors="replace") as stream:
            self._texts[pipe] = stream.read()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Stdout and stderr of the process, when it has ended. Raises TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        for reader in self._readers:
            reader.join()
        out, err = self._texts.values()
        return out, err

    def finished(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """What subprocess.run gives."""
        out, err = self.communicate(timeout)
        return subprocess.CompletedProcess(self._process.name, self.returncode or 0, out, err)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(
    program: Path | str, words: tuple[str, ...], cwd: Path, env: dict[str, str], out: Connection, err: Connection
) -> None:
    """In the new process: what the interpreter does for `python script words` and `python -m module words`."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.argv = [str(program), *words]
    first = str(program.parent if isinstance(program, Path) else cwd)
    sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if isinstance(program, Path):
            runpy.run_path(str(program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
