"""Shared by the tests: a command line in a scratch directory, and one finished smoke run.

`make test` runs several workers (pytest-xdist), each with a scratch directory of its own; what is costly to make is
made by one of them, and copied by the others. `pytest tests/test_x.py` does the same in one process.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from clock import Clock
from forked import Command

from pdistill.files import locked, whole_directory

ROOT = Path(__file__).parent.parent
# Before torch is imported, which no line above does. Workers, and the processes that tests start, would stall each
# other with more threads; and runs are compared to the byte, which holds for equal numbers of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
MOST_WORKERS = 4  # each may hold some GB


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `pytest -n auto` starts: one worker for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """That of bars and of the display."""
    from pdistill import bars

    clock = Clock()
    monkeypatch.setattr(bars, "time", clock)
    return clock


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A directory that the workers of a session have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, shared) -> Path:
    """A directory for this worker's runs; its cache is the session's."""
    directory = tmp_path_factory.mktemp("work")
    (shared / "cache").mkdir(exist_ok=True)
    (directory / "cache").symlink_to(shared / "cache")
    return directory


@pytest.fixture(scope="session")
def once(shared):
    """once(directory, make) fills `directory` by make(), or with a copy of what another worker's make() left in it."""

    def once(directory: Path, make: Callable[[], object]) -> Path:
        kept = shared / "finished" / directory.name
        with locked(shared / "finished" / f"{directory.name}.lock"):
            if kept.exists():
                return shutil.copytree(kept, directory, symlinks=True)
            make()
            if "PYTEST_XDIST_WORKER" in os.environ:
                with whole_directory(kept) as copy:
                    shutil.copytree(directory, copy, symlinks=True, dirs_exist_ok=True)
        return directory

    return once


@pytest.fixture(scope="session")
def start(workplace):
    """start("distill.py", "experiment=smoke") -> a running Command in the workplace."""

    def start(script: str, *overrides: str) -> Command:
        environment = os.environ | {"PDISTILL_CACHE": str(workplace / "cache"), "WANDB_MODE": "offline"}
        return Command(ROOT / script, *overrides, cwd=workplace, env=environment)

    return start


@pytest.fixture(scope="session")
def run(start):
    """run("distill.py", "experiment=smoke") -> (exit status, stdout, stderr)."""

    def run(script: str, *overrides: str) -> tuple[int, str, str]:
        process = start(script, *overrides)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="session")
def smoke(run, workplace, once) -> Path:
    """The run directory of `python distill.py experiment=smoke`, finished."""

    def make() -> None:
        status, _, err = run("distill.py", "experiment=smoke")
        assert status == 0, err

    return once(workplace / "outputs" / "smoke", make)


@pytest.fixture
def told(workplace, monkeypatch, capfd):
    """told("train.py", "sede=1") -> (exit status, stderr), in this process: for what ends before any work starts."""
    from pdistill.commands import cli

    def told(script: str, *overrides: str) -> tuple[int, str]:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *overrides])
        capfd.readouterr()
        try:
            cli.run(script.removesuffix(".py"))
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return status, capfd.readouterr().err

    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PDISTILL_CACHE", str(workplace / "cache"))
    return told


@pytest.fixture
def tiny():
    """tiny("v") -> a small denoiser with random weights, its output not zero."""

    def tiny(name: str = "v", channels: int = 1, size: int = 8, seed: int = 0, **options):
        import torch

        from pdistill.denoiser import Denoiser
        from pdistill.network import unet
        from pdistill.registry import find
        from pdistill.schedule import CosineSchedule

        torch.manual_seed(seed)
        parameterization = find("parameterization", name)()
        network = unet(size, channels, parameterization.channels(channels), 32, 64, [1, 1], 1, [4], **options)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else None
        return Denoiser(network, parameterization, CosineSchedule()).eval()

    return tiny
