"""Shared by the tests: a command line in a scratch directory, and one finished smoke run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A directory for the session's runs, with a cache of its own."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def start(workplace):
    """start("distill.py", "experiment=smoke") -> a Popen in the workplace; output is captured as text."""

    def start(script: str, *overrides: str) -> subprocess.Popen:
        environment = os.environ | {"PDISTILL_CACHE": str(workplace / "cache"), "WANDB_MODE": "offline"}
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *overrides],
            cwd=workplace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

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
def smoke(run, workplace) -> Path:
    """The run directory of `python distill.py experiment=smoke`, finished."""
    status, _, err = run("distill.py", "experiment=smoke")
    assert status == 0, err
    return workplace / "outputs" / "smoke"


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
