"""A process that has imported everything, and forks: each command is a process of its own that starts in no time.

One JSON line in for each request, one out: {"start": {...}} -> {"pid": ...}; {"poll": pid} -> {"status": ... or null}.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import wrong

IMPORTED = (
    "pdistill.commands.cli",
    "pdistill.commands.distill",
    "pdistill.commands.export",
    "pdistill.commands.report",
    "pdistill.commands.stages",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "diffusers.models.unets.unet_2d",
    "pdistill.interop.students",
    "pdistill.method.multistep_consistency",
    "pdistill.method.parallel_decoding",
    "pdistill.method.tract",
    "sklearn.datasets",
    "torch.optim.adamw",
    "torchmetrics.image.fid",
)
REPOSITORY = Path(__file__).parents[2]


def child(words: list[str], cwd: str, log: str, fault: list | None) -> int:
    """What a forked process does: as `python <words>` in `cwd`, with everything it prints in the file `log`."""
    os.setsid()
    os.chdir(cwd)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
        os.dup2(source, number)
    from pdistill.commands import cli

    if fault is not None:
        getattr(wrong, fault[0])(*fault[1:])
    name, *rest = words
    try:
        if name.endswith(".py"):
            sys.argv = [str(REPOSITORY / name), *rest]
            cli.run(name.removesuffix(".py"))
        else:
            sys.argv = ["pdistill", name, *rest]
            cli.main()
        return 0
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    timing = importlib.import_module("pdistill.commands.timing")
    timing.BATCH, timing.ROUNDS = 8, 2  # times are compared with nothing here
    statuses: dict[int, int] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                os._exit(child(**request["start"]))
            print(json.dumps({"pid": pid}), flush=True)
        else:
            pid = request["poll"]
            if pid not in statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps({"status": statuses.get(pid)}), flush=True)


if __name__ == "__main__":
    main()
