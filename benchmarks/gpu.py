"""Everything that is to be measured on a GPU, in one command that goes on where it stopped: `make gpu`.

    python benchmarks/gpu.py --data <CIFAR-10 as JPEGs: a folder, .zip or .tar.xz>
    python benchmarks/gpu.py --rehearse      the same with a toy network on the CPU; its numbers mean nothing

Speed, sampling, parity and quality are many small items. Each call does what fits into `--limit` seconds and stops by
itself: an item that may take longer than what is left is not begun, and the long training is stopped at a checkpoint.
The same command goes on; once all is done it prints the tables. They stand in <output>/results.md, and everything in
results.json, which is written after each item. On another machine `--earlier DIR` takes over the items of a call whose
results.json was brought along. An item that failed is told in the tables, and tried again with `--retry`.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from functools import cached_property, partial
from pathlib import Path
from typing import Any

BEGUN = time.monotonic()  # before torch is imported: the limit is of the whole call
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]

import gpu_results  # noqa: E402
import gpu_speed  # noqa: E402
import gpu_variants  # noqa: E402
import torch  # noqa: E402
from gpu_results import Item, OverTime, Results, at_most  # noqa: E402

from pdistill import __version__  # noqa: E402
from pdistill.commands.complaints import USER_ERRORS, one_line  # noqa: E402
from pdistill.dataset import ImageSet, image_folder  # noqa: E402
from pdistill.errors import Interrupted, UserError, first_line  # noqa: E402
from pdistill.files import read_json, whole  # noqa: E402

STOPPED = (130, -2, -15)  # exit statuses of a command that was interrupted
GRACE = 40.0  # seconds for a training to write its checkpoint, before the limit
SHORTEST = 60.0  # seconds that are worth going on with a training
LONGEST = {"eager": 150.0, "compiled": 260.0, "samplers": 150.0, "parity": 200.0}  # seconds of an item
BASELINES = ("ddim", "dpmsolver++2m", "unipc")
RUN = "gpu-quality"


class Call:
    """One call of the command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rehearsed = options, options.rehearse
        self.sizes = gpu_variants.TOY if options.rehearse else gpu_variants.REAL
        self.work = options.work.resolve()
        self.results = Results.read(options.output, options.earlier, options.rehearse)
        if options.retry:
            self.results.items = {name: item for name, item in self.results.items.items() if "result" in item}
        self.bench = gpu_speed.Bench(self.sizes, lambda: self.images)

    @property
    def left(self) -> float:
        return self.options.limit - (time.monotonic() - BEGUN)

    # ---- the data

    @cached_property
    def images(self) -> ImageSet:
        """What is trained on: the given images, else noise, which does for speed."""
        if self.options.data is not None:
            return image_folder(str(self.folder), self.sizes.size)
        random = torch.Generator().manual_seed(0)
        return ImageSet("noise", torch.randint(0, 256, (512, *self.bench.shape), dtype=torch.uint8, generator=random))

    @cached_property
    def folder(self) -> Path:
        """A folder or zip of classes, which the project decodes once into its cache: `train` of what was given.

        The members of a .tar.xz are put into a zip, as they are.
        """
        data = self.options.data
        if data.is_dir():
            return data / "train" if (data / "train").is_dir() else data
        if data.suffix == ".zip":
            return data
        target = self.work / f"{data.name.partition('.')[0]}.zip"
        if not target.exists():
            with tarfile.open(data) as archive, whole(target) as temporary, zipfile.ZipFile(temporary, "w") as made:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isfile() and not name.startswith("test/"):
                        content = archive.extractfile(member)
                        assert content is not None  # of a file
                        made.writestr(name.removeprefix("train/"), content.read())
        return target

    # ---- the items

    def items(self) -> list[Item]:
        """All, in the order of their importance."""
        found = []
        for batch in self.sizes.batches:
            for name, how in gpu_variants.SPEED.items():
                work = partial(self.bench.steps, batch, how)
                seconds = LONGEST["compiled" if how.compiled else "eager"]
                found.append(Item(f"speed/{batch}/{name}", seconds, work))
        for name in ("float32", "bf16"):
            work = partial(self.bench.samplers, gpu_variants.SPEED[name])
            found.append(Item(f"sampling/{name}", LONGEST["samplers"], work))
        if self.options.data is not None:
            found.append(Item("quality/data", 120.0, self.data))
            found.append(Item("quality/updates", 5.0, self.updates, needs=(self.pace, "quality/data")))
            least = 10.0 if self.rehearsed else SHORTEST
            found.append(Item("quality/training", least, self.train, needs=("quality/updates",), goes_on=True))
            for metrics in ("classifier", *(["inception"] if self.options.inception else [])):
                work = partial(self.evaluate, metrics)
                needs = ("quality/training",)
                found.append(Item(f"quality/fid-{metrics}", least, work, needs=needs, goes_on=True))
        for name, how in gpu_variants.parity(self.sizes).items():
            found.append(Item(f"parity/{name}", LONGEST["parity"], partial(self.bench.losses, how)))
        chosen = {item.name for item in found if item.name.startswith(tuple(self.options.only))}
        for item in reversed(found):  # what is needed comes before
            chosen |= set(item.needs) if item.name in chosen else set()
        return [item for item in found if item.name in chosen]

    @property
    def pace(self) -> str:
        """The item that says how long an update takes."""
        return f"speed/{min(self.sizes.batches)}/bf16"

    def data(self) -> dict[str, Any]:
        """Decodes the images."""
        return {"fingerprint": self.images.fingerprint, "images": len(self.images.images)}

    def updates(self) -> dict[str, int]:
        """Of the teacher and of a stage (the last two take twice as many), from the seconds that one takes."""
        pace, plan = self.results.value(self.pace), self.options.plan
        minutes, stages = self.options.minutes, len(plan) - 1
        teacher = 60 * minutes[0] / pace["teacher"]["seconds"]
        stage = 60 * minutes[1] / pace["distillation"]["seconds"] / (stages + min(2, stages))
        most = 4 if self.rehearsed else 10**9
        return {"teacher": max(1, min(most, int(teacher))), "stage": max(1, min(most, int(stage)))}

    def train(self) -> dict[str, Any] | None:
        """A teacher and its students, by the project's own command."""
        count = self.results.value("quality/updates")
        words = ["experiment=cifar10", f"network={self.sizes.network}", f"trainer={self.sizes.trainer}"]
        words += ["dataset=image_folder", f"dataset.path={self.folder}", f"dataset.image_size={self.sizes.size}"]
        words += [f"training.updates={count['teacher']}", f"training.warmup_updates={count['teacher'] // 20}"]
        words += ["training.ema_decay=auto", "training.dropout=0", "distillation.learning_rate=2e-4"]
        words += [f"{s}.batch_size={min(self.sizes.batches)}" for s in ("training", "distillation")]
        words += [f"steps.plan={self.options.plan}".replace(" ", ""), f"steps.updates={count['stage']}"]
        words += [f"steps.updates_last_two={2 * count['stage']}", "metrics=none", "seed=0"]
        words += [f"name={RUN}", f"output_root={self.runs}", *self.options.train]
        if not self.command("distill", words):
            return None
        self.bring(self.runs / RUN / "comparison.png", "samples.png")
        return {"command": ["distill.py", *words], "summary": read_json(self.runs / RUN / "summary.json")}

    def evaluate(self, metrics: str) -> dict[str, Any] | None:
        """Students and their teacher's samplers at equal evaluations, by the project's own command."""
        words = [f"denoiser={self.runs / RUN}", f"num_steps={self.options.plan}".replace(" ", "")]
        words += [f"baselines=[{','.join(BASELINES)}]", f"metrics={metrics}", f"device={self.sizes.device}"]
        words += [f"metrics.num_samples={self.options.samples}", f"name={RUN}-{metrics}", f"output_root={self.runs}"]
        if metrics == "inception":
            words.append(f"metrics.extractor.weights={self.options.inception.resolve()}")
        if not self.command("evaluate", [*words, *self.options.evaluate]):
            return None
        file = self.runs / "evaluations" / f"{RUN}-{metrics}.json"
        if file.with_suffix(".png").exists():
            self.bring(file.with_suffix(".png"), f"curve-{metrics}.png")
        table = file.with_suffix(".md").read_text(encoding="utf-8")
        return {"command": ["evaluate.py", *words], "rows": read_json(file), "table": table}

    @property
    def runs(self) -> Path:
        return self.work / "runs"

    def bring(self, file: Path, name: str) -> None:
        """Copies a picture beside the results."""
        with whole(self.options.output / name) as temporary:
            temporary.write_bytes(file.read_bytes())

    def command(self, script: str, words: list[str]) -> bool:
        """Runs one of the project's commands until shortly before the limit; whether it has come to its end.

        In a process group of its own, so that Ctrl-C reaches it once. Raises RuntimeError with its last line of error
        where it failed.
        """
        grace = min(GRACE, self.left / 4)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        file = self.work / f"{script}.log"
        with file.open("w", encoding="utf-8") as log:
            command = [sys.executable, str(ROOT / f"{script}.py"), *words]
            process = subprocess.Popen(command, stderr=log, env=environment, process_group=0)
            try:
                status = process.wait(max(1.0, self.left - grace))
            except subprocess.TimeoutExpired:
                process.terminate()  # it writes a checkpoint
                status = process.wait()
            except KeyboardInterrupt:
                process.terminate()
                process.wait(grace)
                raise
            finally:
                process.kill()  # if it is there yet: the checkpoint before is whole
        if status in (0, *STOPPED):
            return status == 0
        lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RuntimeError(f"{script}.py: {lines[-1] if lines else f'exit status {status}'} ({file})")

    # ---- the call

    def run(self) -> str:
        """Does what fits, and says in a line how far it has come."""
        items, kept = self.items(), self.results.items
        for item in items:
            met = all("result" in kept.get(name, {}) for name in item.needs)
            if item.name not in kept and met and item.seconds < self.left:
                self.do(item)
        failed, blocked = {name for name, item in kept.items() if "error" in item}, set()
        for item in items:
            if item.name not in kept and (failed | blocked) & set(item.needs):
                blocked.add(item.name)
        done = sum(item.name in kept for item in items)
        told = f"{done} of {len(items)} items are done"
        if failed or blocked:
            told += f", {len(failed)} of them failed and {len(blocked)} others wait for those: --retry tries again"
        return told if done + len(blocked) == len(items) else f"{told}; the same command goes on"

    def do(self, item: Item) -> None:
        """One item; what it raises is its result, and the others go on."""
        print(f"{item.name} ...", flush=True)
        begun, kept = time.monotonic(), machine(self.sizes.device)
        try:
            with at_most(self.left if item.goes_on else item.seconds):
                result = item.work()
            if result is None:
                print(f"{item.name}: stopped at the limit, to go on", flush=True)
                return
            kept["result"] = result
        except (Exception, OverTime) as error:
            if item.goes_on and isinstance(error, OverTime):
                return
            kept["error"] = f"{type(error).__name__}: {first_line(error)}"
            print(f"{item.name}: {kept['error']}", flush=True)
        kept["seconds"] = time.monotonic() - begun
        self.results.keep(item.name, kept)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what an item was measured."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "version": __version__}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="a toy network on the CPU")
    parser.add_argument("--data", type=Path, help="CIFAR-10's images in folders of classes; without, no quality")
    parser.add_argument("--limit", type=float, default=540, help="seconds of a call (default 540)")
    parser.add_argument("--output", type=Path, default=Path("outputs", "gpu"), help="of results (default outputs/gpu)")
    parser.add_argument("--work", type=Path, default=Path("outputs", "gpu"), help="of runs (default outputs/gpu)")
    parser.add_argument("--earlier", type=Path, help="a folder with results.json of an earlier call elsewhere")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PREFIX", help="items, e.g. speed/128 parity")
    parser.add_argument("--retry", action="store_true", help="also what failed before")
    parser.add_argument("--minutes", nargs=2, type=float, default=(10, 10), help="of the teacher and of all stages")
    parser.add_argument("--plan", nargs="+", type=int, default=[32, 16, 8, 4, 2, 1], help="of step counts")
    parser.add_argument("--samples", type=int, default=10_000, help="to measure each FID with (default 10,000)")
    parser.add_argument("--inception", type=Path, help="torch-fidelity's weights file: FID of the literature as well")
    parser.add_argument("--train", nargs="*", default=[], metavar="KEY=VALUE", help="more words for distill.py")
    parser.add_argument("--evaluate", nargs="*", default=[], metavar="KEY=VALUE", help="more words for evaluate.py")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Does what fits into the limit, and prints the tables."""
    options = parsed(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.data is not None and not options.data.exists():
            raise UserError(f"--data {options.data} does not exist: give CIFAR-10's JPEGs, a folder, .zip or .tar.xz")
        call = Call(options)
        if not options.rehearse and not torch.cuda.is_available():
            raise UserError("there is no GPU here: --rehearse does the same on the CPU, with a toy network")
        call.work.mkdir(parents=True, exist_ok=True)
        told = call.run()
        print(
            f"\n{gpu_results.page(call.results.items, options.rehearse)}\n{told}: {options.output}/results.json and .md"
        )
    except (KeyboardInterrupt, Interrupted):
        sys.exit("stopped; the same command goes on from what is finished")
    except USER_ERRORS as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
