"""One of two processes dies: the other ends with one line, within a minute, and the run goes on afterwards."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chains import CHAIN
from tally import faults

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(home: Path, server) -> subprocess.Popen:
    environment = os.environ | {"PDISTILL_CACHE": str(server.cache), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(ROOT / CHAIN[0]), *CHAIN[1:], "trainer=ddp_cpu", "steps.updates_last_two=400"]
    with (home / "log").open("w") as log:
        return subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)


@pytest.mark.parametrize(
    ("victim", "stage"), [("rank 1", "teacher"), ("rank 0", "steps-0002"), ("rank 1", "steps-0001")]
)
def test_the_others_end_soon(chain, server, victim, stage):
    chain.undisturbed()
    home = chain.home()
    main = start(home, server)
    deadline = time.monotonic() + 240
    while not (home / "outputs" / "chain" / stage / "last.ckpt").exists():
        assert main.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
        time.sleep(0.02)
    (other,) = children(main.pid)
    with faults(f"death of {victim} of two"):
        os.kill(other if victim == "rank 1" else main.pid, signal.SIGKILL)
        died = time.monotonic()
        if victim == "rank 1":
            assert main.wait(60) not in (0, -signal.SIGKILL)
        else:
            main.wait()
            while Path(f"/proc/{other}").exists() and "Z" not in Path(f"/proc/{other}/stat").read_text().split()[2]:
                assert time.monotonic() - died < 60
                time.sleep(0.1)
        said = (home / "log").read_text()
        lines = re.findall("^error: .*another process of this run is gone.*$", said, re.M)
        assert len(lines) == 1 and "Traceback" not in said, said
        print(f"{victim}: the other ended after {time.monotonic() - died:.1f} s")
        assert start(home, server).wait(400) == 0, (home / "log").read_text()
