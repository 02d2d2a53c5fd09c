"""How long it takes until something happens: `python benchmarks/import_time.py`.

Medians over processes of their own. An import is timed inside its process, without the interpreter's start; a command
is timed from the outside, with it. The target: `import pdistill` under 0.3 s.
"""

import argparse
import statistics
import subprocess
import sys
import time

from pdistill.bars import bar

MODULES = ("pdistill", "pdistill.dataset", "pdistill.denoiser", "pdistill.training.fit")
TARGETS = {"import pdistill": 0.3}  # seconds
IMPORT = "import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
COMMAND = "import sys; sys.argv[0] = 'pdistill'; from pdistill.commands.cli import main; main()"


def import_seconds(module: str) -> float:
    """Seconds that `import <module>` takes in a fresh process."""
    return float(_output([sys.executable, "-c", IMPORT.format(module=module)]))


def command_seconds(*arguments: str) -> float:
    """Seconds from the start of `pdistill <arguments>` to its end."""
    start = time.perf_counter()
    _output([sys.executable, "-c", COMMAND, *arguments])
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
    print(f"{'':<30}{'median, s':>10}{'from':>8}{'to':>8}", flush=True)
    for name, (measure, argument) in rows.items():
        measure(argument)  # once for compiled files and the disk's cache
        seconds = [measure(argument) for _ in bar(range(runs), name, unit="process")]
        median, target = statistics.median(seconds), TARGETS.get(name)
        verdict = "" if target is None else f"  {'within' if median < target else 'ABOVE'} the target of {target} s"
        print(f"{name:<30}{median:>10.3f}{min(seconds):>8.3f}{max(seconds):>8.3f}{verdict}", flush=True)


if __name__ == "__main__":
    main()
