"""A training step alone and beside busy processes, under settings of OpenMP: `python benchmarks/busy.py`.

Every setting has a process of its own, which trains the digits network in bursts; the processes take turns, first with
the machine to themselves, then beside `--busy` processes that compute without end. Measure on an otherwise quiet
machine. Rows appear as they are measured, then a table with

    quiet        the median step alone, in units of the default's alone                    target: at most 1.1
    busy         the median step beside busy processes, in units of the default's alone    target: at most 4
    weights      of the network after the same few steps: where they are equal byte for byte, a run may be resumed
                 under the other setting

torch's wheels for Linux bring GNU's OpenMP (libgomp), which reads OMP_* and GOMP_*; KMP_BLOCKTIME is Intel's and LLVM's
and does nothing here, as a check of the measurement.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

SETTINGS = [
    "default",
    "OMP_WAIT_POLICY=passive",
    *(f"GOMP_SPINCOUNT={count}" for count in (0, 1_000, 10_000, 100_000, 300_000, 1_000_000)),
    "KMP_BLOCKTIME=0",
    "OMP_NUM_THREADS=1",
    "OMP_PROC_BIND=true",
    "OMP_PROC_BIND=true GOMP_SPINCOUNT=10000",
    "OMP_PROC_BIND=true OMP_WAIT_POLICY=passive",
]
NETWORK = Path(__file__).parent.parent / "conf" / "network" / "digits.yaml"
OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_")  # variables that a worker does not inherit
BATCH_SIZE = 64
WARM_UP = 5  # steps, after which the weights of all settings are compared
LEAST_STEPS = 3  # of a burst, however long they take


class Worker:
    """A process that trains under one setting, a burst at a time; between bursts it sleeps."""

    def __init__(self, setting: str) -> None:
        self.setting = setting
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(OPENMP)}
        chosen = dict(part.split("=", 1) for part in setting.split() if "=" in part)
        command = [sys.executable, __file__, "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=inherited | chosen, **pipes)
        started = self._answer()
        self.threads, self.weights = started["threads"], started["weights"]

    def burst(self, seconds: float) -> list[float]:
        """Seconds of each training step, for about so long."""
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return self._answer()["steps"]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: the process for {self.setting!r} ended early, with status {self.process.wait()}")
        return json.loads(line)


def work() -> None:
    """What a worker's process does: steps after a line with a number of seconds."""
    import torch
    from omegaconf import OmegaConf

    from pdistill.denoiser import Denoiser
    from pdistill.network import unet
    from pdistill.parameterization import X
    from pdistill.schedule import CosineSchedule
    from pdistill.weighting import truncated_snr

    torch.manual_seed(0)
    settings = {k: v for k, v in OmegaConf.to_container(OmegaConf.load(NETWORK)).items() if not k.startswith("_")}
    denoiser = Denoiser(unet(8, 1, 1, **settings), X(), CosineSchedule()).train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), 1e-3, weight_decay=0.0)
    images = torch.rand(BATCH_SIZE, 1, 8, 8) * 2 - 1

    def step() -> float:
        start = time.perf_counter()
        t = torch.rand(BATCH_SIZE)
        logsnr = denoiser.schedule(t)
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in denoiser.schedule.alpha_sigma(logsnr))
        x_hat = denoiser(alpha * images + sigma * torch.randn_like(images), t)
        loss = (truncated_snr(logsnr) * (x_hat - images).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        step()
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in denoiser.parameters())).hexdigest()[:8]
    print(json.dumps({"threads": torch.get_num_threads(), "weights": weights}), flush=True)
    for line in sys.stdin:
        end, steps = time.perf_counter() + float(line), []
        step()  # wakes the threads
        while time.perf_counter() < end or len(steps) < LEAST_STEPS:
            steps.append(step())
        print(json.dumps({"steps": steps}), flush=True)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that compute until the end of the context."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5 if count else 0)
        yield
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def measure(workers: list[Worker], rounds: int, seconds: float, count: int) -> dict[str, dict[bool, list[float]]]:
    """The steps of every setting, alone (False) and beside `count` busy processes (True)."""
    steps: dict[str, dict[bool, list[float]]] = defaultdict(lambda: {False: [], True: []})
    print(f"{'round':<7}{'beside':<8}{'setting':<46}{'steps':>6}{'median, ms':>12}{'slowest':>9}")
    for number in range(rounds):
        for beside in (False, True):
            with busy(count if beside else 0):
                for worker in workers[number % len(workers) :] + workers[: number % len(workers)]:
                    taken = worker.burst(seconds)
                    steps[worker.setting][beside] += taken
                    row = f"{number + 1:<7}{'busy' if beside else 'nothing':<8}{worker.setting:<46}{len(taken):>6}"
                    print(f"{row}{1000 * statistics.median(taken):>12.1f}{1000 * max(taken):>9.1f}", flush=True)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every setting (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn (default 1)")
    parser.add_argument("--busy", type=int, default=2, help="busy processes (default 2)")
    parser.add_argument(
        "--setting", action="append", help='instead of the list, e.g. "GOMP_SPINCOUNT=5000"; repeatable'
    )
    options = parser.parse_args()
    if options.worker:
        return work()
    settings = list(dict.fromkeys(["default", *(options.setting or SETTINGS)]))
    with ExitStack() as stack:
        workers = []
        for setting in settings:
            workers.append(Worker(setting))
            stack.callback(workers[-1].close)
            print(f"started {setting}: {workers[-1].threads} threads", flush=True)
        steps = measure(workers, options.rounds, options.seconds, options.busy)
    alone = statistics.median(steps["default"][False])
    print(f"\n{'setting':<46}{'threads':>8}{'alone, ms':>11}{'busy, ms':>10}{'quiet':>7}{'busy':>7}  weights")
    for worker in workers:
        quiet, beside = (statistics.median(steps[worker.setting][key]) for key in (False, True))
        good = "  within 1.1 and 4" if quiet <= 1.1 * alone and beside <= 4 * alone else ""
        row = f"{worker.setting:<46}{worker.threads:>8}{1000 * quiet:>11.1f}{1000 * beside:>10.1f}"
        print(f"{row}{quiet / alone:>7.2f}{beside / alone:>7.1f}  {worker.weights}{good}")
    return None


if __name__ == "__main__":
    main()
