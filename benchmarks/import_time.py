"""How long it takes until something happens: `python benchmarks/import_time.py`.

Medians over processes of their own. An import is timed inside its process, without the interpreter's start; a command
is timed from the outside, with it. The target: `import pdistill` under 0.3 s.
"""

import argparse
import statistics
import subprocess
import sys
import time

from tqdm import tqdm

MODULES = ("pdistill", "pdistill.dataset", "pdistill.denoiser")
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
    rows = {
        f"import {module}": (import_seconds, module) for module in ("pdistill", "pdistill.dataset", "pdistill.denoiser")
    }
    rows["pdistill --help"] = (command_seconds, "--help")
    print(f"{'':<24}{'median, s':>10}{'from':>8}{'to':>8}")
    for name, (measure, argument) in rows.items():
        measure(argument)  # once for compiled files and the disk's cache
        seconds = [measure(argument) for _ in tqdm(range(runs), desc=name, leave=False)]
        print(f"{name:<24}{statistics.median(seconds):>10.3f}{min(seconds):>8.3f}{max(seconds):>8.3f}", flush=True)


if __name__ == "__main__":
    main()
