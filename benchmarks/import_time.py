"""How long it takes until something happens: `python benchmarks/import_time.py`.

Medians over processes of their own. An import is timed inside its process, without the interpreter's start; a command
is timed from the outside, with it. "until the first update" is `train.py dataset=digits` from its start to the end of
the optimizer's first step. The targets, on a quiet machine: `import pdistill` under 0.3 s, the first update under 8 s.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

from pdistill.bars import bar

MODULES = ("pdistill", "pdistill.dataset", "pdistill.denoiser", "pdistill.training.fit")
TRAINING = "until the first update"
TARGETS = {"import pdistill": 0.3, TRAINING: 8.0}  # seconds
IMPORT = "import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
COMMAND = "import sys; sys.argv[0] = 'pdistill'; from pdistill.commands.cli import main; main()"

# `pdistill train`, which ends where the first update does
FIRST_UPDATE = """
import os, sys
sys.argv = ["pdistill", *sys.argv[1:]]
from pdistill.commands.cli import main
from pdistill.lazy import quick_imports
with quick_imports():
    from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *step: os._exit(0))
main()
"""


def import_seconds(module: str) -> float:
    """Seconds that `import <module>` takes in a fresh process."""
    return float(_output([sys.executable, "-c", IMPORT.format(module=module)]))


def command_seconds(*arguments: str) -> float:
    """Seconds from the start of `pdistill <arguments>` to its end."""
    start = time.perf_counter()
    _output([sys.executable, "-c", COMMAND, *arguments])
    return time.perf_counter() - start


def update_seconds(folder: str) -> float:
    """Seconds from the start of `pdistill train` in `folder`, to its first update."""
    words = (f"output_root={folder}", "name=first", "overwrite=true")
    start = time.perf_counter()
    _output([sys.executable, "-c", FIRST_UPDATE, "train", *words])
    return time.perf_counter() - start


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="processes for each row (default 7)")
    runs = parser.parse_args().runs
    rows = {f"import {module}": (import_seconds, module) for module in MODULES}
    rows |= {f"pdistill {option}": (command_seconds, option) for option in ("--version", "--help")}
    scratch = tempfile.TemporaryDirectory()
    rows |= {TRAINING: (update_seconds, scratch.name)}
    print(f"{'':<30}{'median, s':>10}{'from':>8}{'to':>8}", flush=True)
    for name, (measure, argument) in rows.items():
        measure(argument)  # once for compiled files and the disk's cache
        seconds = [measure(argument) for _ in bar(range(runs), name, unit="process")]
        median, target = statistics.median(seconds), TARGETS.get(name)
        verdict = "" if target is None else f"  {'within' if median < target else 'ABOVE'} the target of {target} s"
        print(f"{name:<30}{median:>10.3f}{min(seconds):>8.3f}{max(seconds):>8.3f}{verdict}", flush=True)


if __name__ == "__main__":
    main()
