"""Our training step and sampler against others': `python benchmarks/against.py --script train_unconditional.py`.

One machine, the same network, images, batch and precision (float32, CPU). A step is timed from the end of one optimizer
step to the end of the next by the same hook of torch, in processes of their own that take turns:

    ours       train.py as it is typed, with its bar, log, EMA and callbacks
    plain      the plain loop of benchmarks/speed.py
    script     diffusers' examples/unconditional_image_generation/train_unconditional.py, unchanged, with --use_ema;
               it is not part of a package: download it and give --script PATH; needs accelerate and datasets
    package    the Trainer of denoising-diffusion-pytorch around the same network, with its own defaults: an EMA every
               tenth step and as many loading processes as cores
    sampler    `sample` against the diffusers pipeline of the same student, from the same noise, in the same process

All read one folder of PNGs. Who is not there is left out, and a line says what to install. A table follows each round,
and a last one of all rounds; with `--json FILE` they may be measured at several times. Weights and noise are drawn with
seed 0. Measure on an otherwise quiet machine.
"""

import argparse
import importlib.util
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import speed
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from speed import WARM_UP, Case, between, timed
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pdistill.bars import bar
from pdistill.commands.cli import SPIN_COUNT
from pdistill.dataset import digits, image_folder
from pdistill.errors import UserError
from pdistill.files import read_json, write_json
from pdistill.report.tables import markdown
from pdistill.sampling import sample

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "digits": Case("digits", 8, 3, batch=64, steps=30, rounds=5, evaluations=8, samplings=20, limit=1.0),
    "cifar10": Case(
        "cifar10", 32, 3, batch=16, steps=6, rounds=3, evaluations=4, samplings=3, limit=1.0,
        overrides=("network.ch=64", "network.emb_ch=256", "network.num_res_blocks=2"),
    ),
}  # fmt: skip
NAMES = {
    "plain": "train.py / the plain loop",
    "script": "train.py / diffusers' script",
    "package": "train.py / denoising-diffusion-pytorch",
    "sampler": "sample() / diffusers' pipeline",
}
PACKAGE = "denoising_diffusion_pytorch"


class Finished(BaseException):
    """Leaves a contestant's loop once its steps are counted."""


class Wrapped(nn.Module):
    """The network with what denoising-diffusion-pytorch asks of one."""

    self_condition = False

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.channels = self.out_dim = channels

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.network(x, t).sample


def stamped(run: Callable[[], object], steps: int, look: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """When each of the first `steps` optimizer steps ended, whatever makes them; and how many numbers they changed.

    `look(n)` is called after the n-th.
    """
    ends: list[float] = []
    parameters: set[int] = set()

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        ends.append(time.perf_counter())
        look(len(ends))
        if len(ends) == steps:
            parameters.add(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
            raise Finished

    hook = register_optimizer_step_post_hook(note)
    try:
        run()
    except Finished:
        return {"ends": ends, "parameters": parameters.pop()}
    finally:
        hook.remove()
    raise UserError(f"the loop ended after {len(ends)} of {steps} optimizer steps: see what it printed")


def program(file: Path, *arguments: object) -> None:
    """A script in this process, as if it had been typed."""
    sys.argv = [str(file), *map(str, arguments)]
    runpy.run_path(str(file), run_name="__main__")


def ours(case: Case, work: Path) -> None:
    """train.py, which would go on to its default number of updates."""
    keys: dict[str, object] = {
        "dataset": "image_folder",
        "dataset.path": work / "images",
        "dataset.image_size": case.size,
        "dataset.image_channels": case.channels,
        "dataset.flips": "false",
        "network": case.network,
        "training.batch_size": case.batch,
        "metrics": "none",
        "output_root": work / "outputs",
        "name": "ours",
        "overwrite": "true",
    }
    program(ROOT / "train.py", *(f"{key}={value}" for key, value in keys.items()), *case.overrides)


def plain(case: Case, work: Path) -> None:
    speed.bare(speed.new_denoiser(case), image_folder(str(work / "images"), case.size, case.channels), case)


def script(case: Case, work: Path, file: Path) -> None:
    """diffusers' example, of one epoch that is long enough."""
    options: dict[str, object] = {
        "train_data_dir": work / "images",
        "model_config_name_or_path": work / "network",
        "resolution": case.size,
        "train_batch_size": case.batch,
        "num_epochs": 1,
        "mixed_precision": "no",
        "output_dir": work / "script",
        "cache_dir": work / "datasets",
    }
    program(file, "--use_ema", *(f"--{key}={value}" for key, value in options.items()))


def package(case: Case, work: Path) -> None:
    """The package's own Trainer; it predicts x, as ours does."""
    module: Any = importlib.import_module(PACKAGE)
    network = Wrapped(speed.new_denoiser(case).network, case.channels)
    diffusion = module.GaussianDiffusion(network, image_size=case.size, objective="pred_x0")
    options = {"train_batch_size": case.batch, "augment_horizontal_flip": False, "calculate_fid": False}
    module.Trainer(diffusion, str(work / "images"), results_folder=str(work / "package"), **options).train()


def sampler(case: Case, work: Path) -> dict[str, Any]:
    """Seconds of both for the same images, as arrays of floats in [0, 1], and by how much these differ at most."""
    student = speed.new_denoiser(case).eval()
    student.num_steps = case.evaluations
    student.save(work / "student")
    pipeline: Any = DiffusionPipeline.from_pretrained(work / "student")
    pipeline.set_progress_bar_config(disable=True)
    shape, steps = (case.batch, case.channels, case.size, case.size), case.evaluations

    def by_us() -> np.ndarray:
        images = sample(student, torch.randn(shape, generator=torch.manual_seed(0)), steps)
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def by_them() -> np.ndarray:
        generator = torch.manual_seed(0)
        return pipeline(case.batch, generator, num_inference_steps=steps, output_type="np").images

    difference = float(np.abs(by_us() - by_them()).max())
    a, b = speed.in_turns(lambda: timed(by_us, 1), lambda: timed(by_them, 1), case.samplings, "sampler")
    return {"ours": a, "theirs": b, "difference": difference}


def work_as(name: str, case: Case, work: Path, file: Path | None) -> dict[str, Any]:
    """What a contestant's process measures."""
    if name == "sampler":
        return sampler(case, work)
    runs: dict[str, Callable[[], None]] = {
        "ours": lambda: ours(case, work),
        "plain": lambda: plain(case, work),
        "script": lambda: script(case, work, file or Path()),
        "package": lambda: package(case, work),
    }
    return stamped(runs[name], case.steps + WARM_UP + 1)


def prepare(case: Case, work: Path) -> None:
    """The folder of PNGs, enough for all steps of one epoch, and the network's configuration as diffusers reads it."""
    folder = work / "images"
    folder.mkdir(parents=True)
    images = digits().images[:, 0].numpy()
    for k in range(case.batch * (case.steps + WARM_UP + 2)):
        picture = Image.fromarray(images[k % len(images)])
        picture.resize((case.size, case.size)).convert("RGB").save(folder / f"{k:06}.png")
    network: Any = speed.new_denoiser(case).network
    network.save_config(work / "network")


def alone(file: Path, name: str, work: Path, *arguments: str) -> dict[str, Any]:
    """What `file --worker name` leaves in `work`/name.json. Raises UserError with its last words where it fails."""
    environment = {
        "GOMP_SPINCOUNT": SPIN_COUNT,  # as our commands set it; it helps whoever has several processes
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "PDISTILL_CACHE": str(work / "cache"),
    } | os.environ
    result = work / f"{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(file), "--worker", name, "--work", str(work), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not result.exists():
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        raise UserError(f"{name} stopped with status {done.returncode}: {lines[-1]}")
    return read_json(result)


def measured(name: str, case: Case, work: Path, script: Path | None) -> dict[str, Any]:
    """What a contestant measures in a process of its own."""
    write_json(work / "case.json", vars(case))
    return alone(Path(__file__).resolve(), name, work, *(["--script", str(script)] if script else []))


def missing(name: str, file: Path | None) -> str | None:
    """What must be given or installed before `name` can be measured; None if nothing."""

    def installed(module: str) -> bool:
        return importlib.util.find_spec(module) is not None

    if name == "script":
        if file is None:
            return "give --script PATH, diffusers' examples/unconditional_image_generation/train_unconditional.py"
        if not file.is_file():
            return f"--script {file} is not a file"
        absent = [module for module in ("accelerate", "datasets", "tensorboard") if not installed(module)]
        return f"pip install {' '.join(absent)}" if absent else None
    if name == "package" and not installed(PACKAGE):
        return (
            "pip install denoising-diffusion-pytorch (without changing your other packages: pip install --no-deps "
            "--target DIR denoising-diffusion-pytorch ema-pytorch einops pytorch-fid, and PYTHONPATH=DIR)"
        )
    return None


def one_round(names: list[str], case: Case, script: Path | None, number: int) -> dict[str, list[float]]:
    """Seconds of every step of all contestants, which take turns in being the first."""
    order = [*(["ours"] if set(names) - {"sampler"} else []), *names]
    seconds: dict[str, list[float]] = {}
    parameters: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        prepare(case, work)
        for name in bar(order[number % len(order) :] + order[: number % len(order)], f"round {number + 1}", unit="one"):
            result = measured(name, case, work, script)
            if name == "sampler":
                if result["difference"] > 1e-2:
                    raise UserError(f"the pipeline's images differ from ours by {result['difference']:.3g} of 1")
                seconds |= {"sample": result["ours"], "sampler": result["theirs"]}
            else:
                seconds[name], parameters[name] = between(result["ends"]), result["parameters"]
    if len(set(parameters.values())) > 1:
        raise UserError(f"the networks differ in their numbers of parameters: {parameters}")
    return seconds


def table(rounds: list[dict[str, Any]]) -> list[str]:
    """Medians of all seconds; and, of the ratios of single rounds, the median, the least and the most."""
    lines = []
    for network in dict.fromkeys(one["network"] for one in rounds):
        for name in NAMES:
            us = "sample" if name == "sampler" else "ours"
            pairs = [(s[us], s[name]) for s in (r["seconds"] for r in rounds if r["network"] == network) if name in s]
            if not pairs:
                continue
            ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
            taken = [statistics.median([t for pair in pairs for t in pair[side]]) for side in (0, 1)]
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            cells = [*(f"{1000 * t:.1f}" for t in taken), f"{statistics.median(ratios):.3f}", spread, str(len(pairs))]
            lines.append([network, NAMES[name], *cells])
    return markdown(["network", "ours / theirs", "ours, ms", "theirs, ms", "ratio", "single rounds", "rounds"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, metavar="PATH", help="diffusers' train_unconditional.py")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="these comparisons; by default all that can be made")
    parser.add_argument("--network", nargs="+", choices=CASES, default=list(CASES), help="by default both")
    parser.add_argument("--rounds", type=int, help="turns of all of them (default: 5 and 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keeps all seconds; further rounds are added to it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.worker:
            case = read_json(options.work / "case.json")
            case = Case(**case | {"overrides": tuple(case["overrides"])})
            result = work_as(options.worker, case, options.work, options.script)
            write_json(options.work / f"{options.worker}.json", result)
            return
        compare(options)
    except UserError as error:
        sys.exit(f"error: {error}")


def compare(options: argparse.Namespace) -> None:
    """The rounds that were asked for, and the table of them and those that the file keeps."""
    chosen = []
    for name in options.only or NAMES:
        problem = missing(name, options.script)
        if problem is None:
            chosen.append(name)
        elif options.only:
            raise UserError(f"{name} cannot be measured: {problem}")
        else:
            print(f"left out: {name}: {problem}")
    kept = {"machine": speed.machine(), "rounds": []}
    if options.json is not None:
        kept = read_json(options.json, kept)
        if kept["machine"] != speed.machine():
            raise UserError(f"{options.json} is of another machine, {kept['machine']}: give another file")
    for network in options.network:
        case = CASES[network]
        for number in range(case.rounds if options.rounds is None else options.rounds):
            kept["rounds"].append({"network": network, "seconds": one_round(chosen, case, options.script, number)})
            print("\n".join(table(kept["rounds"][-1:])), flush=True)
            if options.json is not None:
                write_json(options.json, kept)
    print("\n".join(["", f"{kept['machine']}, float32, all rounds:", "", *table(kept["rounds"])]))


if __name__ == "__main__":
    main()
