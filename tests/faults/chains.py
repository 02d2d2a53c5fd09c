"""Chains that are small, started in no time, and compared with an undisturbed one."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CHAIN = (
    "distill.py",
    "experiment=smoke",
    "name=chain",
    "network.emb_ch=32",
    "network.ch_mult=[1]",
    "network.attn_resolutions=[]",
    "metrics.num_samples=50",
    "training.updates=12",
    "training.batch_size=8",
    "distillation.batch_size=8",
    "distillation.ema_decay=0.9",
    "steps.plan=[4,2,1]",
    "steps.updates=9",
    "steps.updates_last_two=9",
    "checkpoint_every_n_updates=4",
)
METHODS = {
    "halving": (),
    "tract": ("method=tract",),
    "multistep_consistency": (
        "method=multistep_consistency",
        "method.teacher_steps_from=16",
        "method.teacher_steps_to=32",
    ),
    "parallel_decoding": ("method=parallel_decoding",),
}
TIMES = ("seconds_per_image", "seconds_per_image_spread", "timed_steps", "training_seconds", "joules")
NOT_COMPARED = ("csv", "report.html")  # which tell of times


class Process:
    """A command in a process of its own."""

    def __init__(self, server: "Server", pid: int, log: Path) -> None:
        self.server, self.pid, self.log = server, pid, log

    def status(self) -> int | None:
        return self.server.ask({"poll": self.pid})["status"]

    def ended(self, seconds: float = 300) -> int | None:
        """Its exit status, or minus the signal; None if it still runs after so many seconds."""
        deadline = time.monotonic() + seconds
        while (status := self.status()) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return status

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def error(self) -> str:
        """The one line that a command ends with; raises AssertionError where it said anything else of an error."""
        lines = re.findall(r"^error: .*$", self.said, re.M)
        assert len(lines) == 1 and "Traceback" not in self.said, self.said
        return lines[0]


class Server:
    """The process that forks commands."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        environment = os.environ | {
            "PDISTILL_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
        }
        command = [sys.executable, str(HERE / "server.py")]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        assert self.answers.readline(), "the server did not start"

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        return json.loads(self.answers.readline())

    def start(self, home: Path, *words: str, fault: list | None = None) -> Process:
        """`python <words>` in the directory `home`."""
        self.number = getattr(self, "number", 0) + 1
        log = Path(os.environ["PDISTILL_FAULT_LOGS"]) / f"{self.number}.log"
        request = {"words": words, "cwd": str(home), "log": str(log), "fault": fault}
        return Process(self, self.ask({"start": request})["pid"], log)


def content(directory: Path) -> dict[str, str]:
    """Every file of a run by a hash of what it says, but for the times that things took."""
    found = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file() or p.is_symlink()):
        name = str(file.relative_to(directory))
        if name.split("/")[0] in NOT_COMPARED:
            continue
        data = file.read_bytes()
        if file.suffix == ".json":
            data = json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, list):
        return [_timeless(v) for v in value]
    return {k: v for k, v in value.items() if k not in TIMES} if isinstance(value, dict) else value


def finished(directory: Path) -> dict[str, tuple[int, int]]:
    """The stages that are trained, and which files stand for them: one that is written again has another number."""
    found = directory.glob("*/denoiser/denoiser.json")
    return {p.parent.parent.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


class Chain:
    """Runs of one small chain, each in a home of its own."""

    def __init__(self, server: Server, work: Path) -> None:
        self.server, self.work = server, work
        self.known: dict[str, tuple[dict[str, str], float]] = {}
        self.homes = 0

    def home(self) -> Path:
        self.homes += 1
        home = self.work / f"home-{self.homes}"
        home.mkdir()
        return home

    def start(self, home: Path, method: str = "halving", *words: str, fault: list | None = None) -> Process:
        return self.server.start(home, *CHAIN, *METHODS[method], *words, fault=fault)

    def finish(self, home: Path, method: str = "halving", *words: str) -> None:
        """The same command again, to its end; then everything must be as it is undisturbed, and nothing else there."""
        process = self.start(home, method, *words)
        assert process.ended() == 0, process.said
        self.check(home, method)

    def check(self, home: Path, method: str = "halving") -> None:
        undisturbed, _ = self.undisturbed(method)
        now = content(home / "outputs" / "chain")
        assert now == undisturbed, sorted(k for k in now | undisturbed if now.get(k) != undisturbed.get(k))
        assert not list(home.rglob("*.partial")), list(home.rglob("*.partial"))

    def undisturbed(self, method: str = "halving") -> tuple[dict[str, str], float]:
        """The content of a run that nothing happened to, and the seconds that it took."""
        if method not in self.known:
            home = self.home()
            warm = self.start(home, method)  # the first makes caches
            assert warm.ended() == 0, warm.said
            begun, again = time.monotonic(), self.home()
            process = self.start(again, method)
            assert process.ended() == 0, process.said
            seconds = time.monotonic() - begun
            first, second = (content(h / "outputs" / "chain") for h in (home, again))
            assert first == second
            self.known[method] = first, seconds
        return self.known[method]


@contextlib.contextmanager
def mounted(directory: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `directory`; skips the test where this user may not mount."""
    directory.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a small disk, which root may: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def remount(directory: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", directory], check=True)
