"""The command line: subcommands, composing, one-line errors, help, sweeps.

`pdistill train ...` and `python train.py ...` do the same: Hydra composes conf/train.yaml with the overrides, and
`commands.train.main(cfg)` does the work.
"""

import contextlib
import importlib
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pdistill import __version__
from pdistill.commands import help as help_page
from pdistill.commands import jobs
from pdistill.commands.arguments import with_folders
from pdistill.commands.complaints import USER_ERRORS, cause_of, one_line
from pdistill.commands.settings import conf
from pdistill.commands.steps_key import steps_is_a_key
from pdistill.commands.stopping import end_on_signals, requeued, what_remains
from pdistill.errors import Interrupted, UserError
from pdistill.faults import Fault, in_words
from pdistill.processes import is_main

COMPOSED = ("train", "distill", "evaluate", "sample", "estimate")  # by Hydra, from conf/<command>.yaml
# How long an OpenMP thread spins before it sleeps. By default for good, so that training beside busy processes stalls;
# measured by benchmarks/busy.py, which also shows that the weights stay the same to the byte.
SPIN_COUNT = "10000"
# Of what is finished: `pdistill report outputs/a outputs/b`
PLAIN = ("status", "report", "sweep", "export", "push", "play")


def main() -> None:
    """The `pdistill` command."""
    _prepare_process()
    command, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if command in ("--version", "-V"):
        print(f"pdistill {__version__}")
    elif command in ("--help", "-h", "help"):
        print(help_page.overview())
    elif command in ("--shell-completion", "-sc"):
        _complete(rest)
    elif command in COMPOSED:
        run(command, subcommand=True)
    elif command in PLAIN:
        _plain(command, rest)
    else:
        _fail(UserError(f"there is no command {command!r}: choose among {', '.join((*COMPOSED, *PLAIN))}"))


def run(command: str, subcommand: bool = False) -> None:
    """Composes conf/<command>.yaml with the command line and calls `commands.<command>.main(cfg)`; ends the process.

    A user's mistake, Hydra's own complaints included, is one line on stderr and a non-zero exit status. In a
    multirun a failed job does not end the sweep; the sweep's table lists it, and the job's value is not a number.
    """
    _prepare_process()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through, to be told here in one line
    end_on_signals(what_remains(command))
    typed = list(sys.argv)
    arguments = with_folders([_with_home(word) for word in typed[2 if subcommand else 1 :]])
    if {"--help", "-h"} & set(arguments):
        print(help_page.of_command(command, subcommand))
        return
    sys.argv = [typed[0], *arguments]
    failures: list[BaseException] = []

    @hydra.main(version_base="1.3", config_path=str(conf()), config_name=command)
    def composed(cfg: DictConfig) -> float | None:
        sys.argv = typed  # further processes are started with the command line as it was
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return jobs.run_job(command, cfg, typed[: 2 if subcommand else 1])
        try:
            return jobs.job(command)(cfg)
        except (*USER_ERRORS, Interrupted) as error:  # kept from Hydra, which would print lines of its own
            failures.append(error)
            return None

    try:
        sweep = jobs.prepare(arguments)
        with steps_is_a_key() if command == "evaluate" else contextlib.nullcontext():
            complaint = jobs.run_all(composed, sweep, arguments)
        if failures:
            raise failures[0]
        if sweep is not None:
            jobs.finish(command, sweep, complaint)
    except (*USER_ERRORS, Interrupted) as error:
        _fail(error)


def _plain(command: str, arguments: list[str]) -> None:
    end_on_signals(what_remains(command))
    try:
        with in_words(command, "use a smaller batch, or a device with more"):
            importlib.import_module(f"pdistill.commands.{command}").main(arguments)
    except (*USER_ERRORS, Interrupted) as error:
        _fail(error)


def _fail(error: BaseException) -> NoReturn:
    """Ends the process with the error's line; a reader that went away (`| head`) needs none."""
    if isinstance(error, BrokenPipeError):
        os._exit(1)
    cause = cause_of(error)
    restarts = isinstance(error, Interrupted) and any(re.match(r"\+*overwrite=true", w, re.I) for w in sys.argv)
    what_follows = ", if overwrite=true is left out" if restarts else requeued(error)
    if is_main() or isinstance(cause, Fault):
        print(f"error: {one_line(error)}{what_follows}", file=sys.stderr)
    sys.exit(getattr(cause, "exit_code", 2))


def _with_home(word: str) -> str:
    """key=~/x with the home directory, which shells expand at the beginning of words alone."""
    found = re.fullmatch(r"([\w.@/+-]+=)~(/.*)?", word)
    return f"{found[1]}{Path.home()}{found[2] or ''}" if found else word


def _prepare_process() -> None:
    """What must be so before torch is imported, and before anything is opened."""
    _occupy_closed_streams()
    if "OMP_WAIT_POLICY" not in os.environ:  # the user's word
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def _occupy_closed_streams() -> None:
    """A standard stream that was closed (`>&-`) becomes a sink: nothing else may get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


# Shell completion: Hydra's, which knows no subcommands


def _complete(words: list[str]) -> None:
    line = os.environ.get("COMP_LINE", "").split(" ")
    if words[:1] == ["query=bash"] and len(line) < 3:
        print(" ".join(c for c in (*COMPOSED, *PLAIN) if c.startswith(line[-1])))
        return
    command = line[1] if len(line) > 1 and line[1] in COMPOSED else "train"
    if words[:1] == ["query=bash"]:
        os.environ["COMP_LINE"] = " ".join([line[0], *line[2:]])
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    sys.argv = [sys.argv[0], "--shell-completion", *words]
    hydra.main(version_base="1.3", config_path=str(conf()), config_name=command)(lambda cfg: None)()


if __name__ == "__main__":
    main()
