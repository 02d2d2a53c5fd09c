"""Weak scaling of DDP: two processes of one thread each against one: `python benchmarks/scaling.py`.

Four processes are started, each of one thread, and take turns: one trains alone; two train beside each other and know
nothing of one another, which is as well as the hardware can do; two train as one by DDP, each with as many images as
the one alone. Scaling is seconds alone over seconds together. All go through `fit`: Lightning's loop, all callbacks.
Wants two idle cores, and about 2 GiB a process for the paper's CIFAR-10 network.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ENDLESS = 10**9
SIZES = {"cifar10": (32, 3), "digits": (8, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar10", choices=sorted(SIZES))
    parser.add_argument("--batch", type=int, default=4, help="images of a process in an update")
    parser.add_argument("--updates", type=int, default=2, help="timed updates of a turn; one more goes before them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="keep every update's seconds in this file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is None:
        measure(arguments)
    else:
        work(arguments)


def work(arguments: argparse.Namespace) -> None:
    """One process: trains a turn for each line that it reads, and answers with the seconds of its updates."""
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from lightning import Callback, Trainer

    from pdistill.commands.settings import conf
    from pdistill.dataset import ImageSet
    from pdistill.denoiser import Denoiser
    from pdistill.parameterization import X
    from pdistill.schedule import CosineSchedule
    from pdistill.training.data import ImageDataModule
    from pdistill.training.fit import FitSettings, fit
    from pdistill.training.module import Recipe
    from pdistill.training.settings import Training
    from pdistill.training.teacher import TeacherModule
    from pdistill.weighting import truncated_snr

    class Turns(Callback):
        """Before an update: waits for its turn. After it: takes the time."""

        def __init__(self) -> None:
            self.left, self.ends = 0, []

        def on_train_batch_start(self, *_: Any) -> None:
            if self.left:
                return
            if self.ends:
                pairs = zip(self.ends, self.ends[1:], strict=False)
                print("seconds", json.dumps([b - a for a, b in pairs]), flush=True)
            else:
                print("seconds []", flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.left, self.ends = arguments.updates + 1, []

        def on_train_batch_end(self, *_: Any) -> None:
            self.left -= 1
            self.ends.append(time.perf_counter())

    torch.set_num_threads(1)
    size, channels = SIZES[arguments.network]
    with initialize_config_dir(str(conf()), version_base="1.3"):
        part = instantiate(compose("train", [f"network={arguments.network}", "name=bench"]).network)
    torch.manual_seed(0)
    denoiser = Denoiser(part(size, channels, channels), X(), CosineSchedule())
    images = torch.randint(256, (2048, channels, size, size), dtype=torch.uint8)
    together = arguments.worker
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp"} if together else {"devices": 1}
    with tempfile.TemporaryDirectory() as directory:
        settings = FitSettings(
            directory=Path(directory) / "stage",
            prefix="bench",
            updates=ENDLESS,
            num_steps=8,
            trainer=partial(Trainer, accelerator="cpu", log_every_n_steps=ENDLESS, **options),
            callbacks=[Turns()],
            checkpoint_every_n_updates=ENDLESS,
            progress_bar=False,
        )
        batch = arguments.batch * (2 if together else 1)
        data = ImageDataModule(ImageSet("noise", images, None), batch, seed=0, stage=0)
        recipe = Recipe(Training(batch_size=batch, ema_decay=0.999), truncated_snr)
        fit(TeacherModule(denoiser, recipe), data, settings)


class Worker:
    """A process of `work`; of two that train together, the one of that rank."""

    def __init__(self, rank: int | None, port: int) -> None:
        launched = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
        environment = {k: v for k, v in os.environ.items() if k not in launched} | {"OMP_NUM_THREADS": "1"}
        if rank is not None:
            environment |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, *sys.argv, "--worker", "0" if rank is None else "1"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def begin(self) -> None:
        """Its turn."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def seconds(self) -> list[float]:
        """Of its updates, when the turn is over."""
        for line in self.process.stdout:
            if line.startswith("seconds"):
                return json.loads(line.removeprefix("seconds"))
        raise SystemExit(f"a process has ended with status {self.process.wait()}")


def measure(arguments: argparse.Namespace) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    single = [Worker(None, port), Worker(None, port)]
    together = [Worker(rank, port) for rank in (0, 1)]
    workers = [*single, *together]
    sides = {"alone": single[:1], "side by side": single, "together": together}
    kept: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for worker in workers:
            worker.seconds()  # it is ready
        for k in range(arguments.rounds + 1):
            for name, side in sides.items():
                for worker in side:
                    worker.begin()
                # the slower process of each update is the one that counts
                found = [max(both) for both in zip(*(worker.seconds() for worker in side), strict=True)]
                if k:  # the first round warms up
                    kept[name] += found
                    print(f"round {k}, {name}: {', '.join(f'{s:.2f}' for s in found)} s an update", flush=True)
    finally:
        for worker in workers:
            worker.process.kill()
    medians = {name: statistics.median(seconds) for name, seconds in kept.items()}
    report(arguments, medians)
    if arguments.json:
        setting = {"network": arguments.network, "batch": arguments.batch, "processor": platform.processor()}
        arguments.json.write_text(json.dumps({**setting, "seconds": kept}, indent=1))


def report(arguments: argparse.Namespace, medians: dict[str, float]) -> None:
    alone, apart, together = medians.values()
    print(f"\n{arguments.network}, {arguments.batch} images a process and update, one thread each, float32, medians")
    print(f"alone         {alone:8.3f} s an update")
    print(f"side by side  {apart:8.3f} s, {alone / apart:.3f} of alone: what the hardware can do")
    print(f"together      {together:8.3f} s, {alone / together:.3f} of alone, {apart / together:.3f} of side by side")


if __name__ == "__main__":
    main()
