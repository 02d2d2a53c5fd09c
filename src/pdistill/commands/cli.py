"""The command line: subcommands, composing, one-line errors, help, sweeps.

`pdistill train ...` and `python train.py ...` do the same: Hydra composes conf/train.yaml with the overrides, and
`commands.train.main(cfg)` does the work.
"""

import contextlib
import difflib
import importlib
import math
import os
import re
import signal
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pdistill import __version__
from pdistill.commands import help as help_page
from pdistill.commands import run_directory
from pdistill.commands.settings import conf
from pdistill.commands.steps_key import steps_is_a_key
from pdistill.errors import Interrupted, UserError, first_line
from pdistill.files import read_json, write_json
from pdistill.processes import is_main

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException, OSError)
COMPOSED = ("train", "distill", "evaluate", "sample")  # by Hydra, from conf/<command>.yaml
PLAIN = ("report", "sweep")  # of finished runs: `pdistill report outputs/a outputs/b`
SWEEP = "PDISTILL_SWEEP"  # of a sweep's jobs, in whatever process: the directory of their results


def main() -> None:
    """The `pdistill` command."""
    _occupy_closed_streams()
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
    _occupy_closed_streams()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through, to be told here in one line
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    typed = list(sys.argv)
    arguments = [_with_home(word) for word in typed[2 if subcommand else 1 :]]
    if {"--help", "-h"} & set(arguments):
        print(help_page.of_command(command, subcommand))
        return
    sys.argv = [typed[0], *arguments]
    failures: list[BaseException] = []

    @hydra.main(version_base="1.3", config_path=str(conf()), config_name=command)
    def composed(cfg: DictConfig) -> float | None:
        sys.argv = typed  # further processes are started with the command line as it was
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return _sweep_job(command, cfg, typed[: 2 if subcommand else 1])
        try:
            return _job(command)(cfg)
        except (*USER_ERRORS, Interrupted) as error:  # kept from Hydra, which would print lines of its own
            failures.append(error)
            return None

    try:
        sweep = _prepare_sweep(arguments)
        with steps_is_a_key() if command == "evaluate" else contextlib.nullcontext():
            composed()
        if failures:
            raise failures[0]
        if sweep is not None and command in ("train", "distill"):
            _finish_sweep(sweep)
    except (*USER_ERRORS, Interrupted) as error:
        _fail(error)


def _job(command: str) -> Callable[[DictConfig], float | None]:
    """What a command does with its configuration, after importing the modules that register the user's parts."""

    def job(cfg: DictConfig) -> float | None:
        for module in cfg.get("imports") or []:
            _import(module)
        return importlib.import_module(f"pdistill.commands.{command}").main(cfg)

    return job


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name))
        hint = "install it, or put its folder into PYTHONPATH" if missing else "fix that module"
        raise UserError(
            f"imports=[{module}] cannot be imported ({type(error).__name__}: {first_line(error)}): {hint}"
        ) from error


def _plain(command: str, arguments: list[str]) -> None:
    try:
        importlib.import_module(f"pdistill.commands.{command}").main(arguments)
    except USER_ERRORS as error:
        _fail(error)


# Sweeps


def _prepare_sweep(arguments: list[str]) -> Path | None:
    """Of a multirun: the directory of its jobs' results, in the environment, which jobs in other processes inherit."""
    if not ({"-m", "--multirun"} & set(arguments) or any("hydra.mode=MULTIRUN" in a for a in arguments)):
        return None
    words = [a for a in arguments if "=" in a and not a.startswith("-")]
    swept = [o.key_or_group for o in OverridesParser.create().parse_overrides(words) if o.is_sweep_override()]
    os.environ[run_directory.SWEPT] = " ".join(filter(None, swept))
    os.environ[SWEEP] = uuid.uuid4().hex[:8]
    return Path(os.environ[SWEEP])


def _results(cfg: DictConfig) -> Path:
    return Path(cfg.get("output_root", "outputs")).expanduser().resolve() / ".multirun" / os.environ[SWEEP]


def _sweep_job(command: str, cfg: DictConfig, program: list[str]) -> float | None:
    """One job of a sweep, in this process or a launcher's; leaves its result for the table."""
    hydra_cfg, overrides = HydraConfig.get(), list(HydraConfig.get().overrides.task)
    params = list(map(str, hydra_cfg.sweeper.get("params") or {}))
    os.environ[run_directory.SWEPT] = " ".join({*os.environ.get(run_directory.SWEPT, "").split(), *params})
    typed = run_directory.typed_overrides(overrides)
    if "name" in typed and cfg.get("name"):
        cfg.name = run_directory.sweep_name(typed["name"], overrides)
    print(f"\nsweep, job {hydra_cfg.job.num}: {' '.join(overrides)}", flush=True)
    value, error = _run_sweep_job(command, cfg, program, overrides)
    if cfg.get("name"):
        names = {k: v for k, v in hydra_cfg.runtime.choices.items() if "/" not in k and v}
        choices = {k: v for k, v in typed.items() if k != "name"}
        result = {"name": cfg.name, "output_root": cfg.get("output_root", "outputs"), "error": error}
        result |= {"groups": names, "choices": choices, "value": value}
        write_json(_results(cfg) / f"{hydra_cfg.job.num:05d}.json", result)
    return math.nan if error else value


def _run_sweep_job(
    command: str, cfg: DictConfig, program: list[str], overrides: list[str]
) -> tuple[float | None, str | None]:
    """The job's value, and its error in a line or None.

    With several devices the job gets a process of its own: Lightning starts the other ranks by this process's
    command line, which would run the whole sweep again in each of them.
    """
    devices = cfg.trainer.devices if cfg.get("trainer") else cfg.get("devices", 1)
    if devices != 1:
        words = [o for o in overrides if not re.match(r"[+~]*name=", o)] + ([f"name={cfg.name}"] if cfg.name else [])
        environment = {k: v for k, v in os.environ.items() if k not in (SWEEP, run_directory.SWEPT)}
        status = subprocess.run([sys.executable, *program, *_outside_conf(), *words], env=environment).returncode
        return None, None if status == 0 else f"exit status {status}, its line of error is above"
    try:
        return _job(command)(cfg), None
    except USER_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return None, one_line(error)
    except Exception as error:  # a bug of ours or a machine's limit: the other jobs are worth finishing
        traceback.print_exc()
        return None, one_line(error)


def _outside_conf() -> list[str]:
    """The words of the command line that say where else configurations are."""
    config = HydraConfig.get()
    words = [o for o in config.overrides.hydra if o.lstrip("+").startswith("hydra.searchpath")]
    given = [s.path for s in config.runtime.config_sources if s.provider == "command-line"]
    return [*(word for path in given for word in ("--config-dir", path)), *words]


def _finish_sweep(sweep: Path) -> None:
    """The table over the jobs of a sweep, in whatever process they ran. Raises UserError if one failed."""
    from pdistill.commands import sweep as table

    roots = [Path(o.partition("=")[2]) for o in sys.argv if o.startswith("output_root=")] or [Path("outputs")]
    folder = roots[0].expanduser() / ".multirun" / sweep.name
    results: list[Any] = [read_json(path) for path in sorted(folder.glob("*.json"))]
    if results:
        table.finish([table.Job.of_result(result) for result in results])


# Errors


def _fail(error: BaseException) -> NoReturn:
    """Ends the process with the error's line; a reader that went away (`| head`) needs none."""
    if isinstance(error, BrokenPipeError):
        os._exit(1)
    cause = _cause(error)
    if is_main():
        print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(getattr(cause, "exit_code", 2))


def _cause(error: BaseException) -> BaseException:
    """Of an error inside `instantiate`, what raised it."""
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause if isinstance(cause, UserError | ValueError | OSError | TypeError) else error


def one_line(error: BaseException) -> str:
    """A user's mistake in one line that names the key or the file, whoever raised it."""
    cause = _cause(error)
    key = next((e.full_key for e in _chain(error) if getattr(e, "full_key", None)), None)
    if isinstance(error, OverrideParseException):
        text = _needs_quotes(error)
    elif isinstance(cause, UserError):
        text = str(cause)
    elif isinstance(cause, OSError) and cause.strerror:
        text = f"{cause.filename or ''}: {cause.strerror}".lstrip(": ")
    elif isinstance(error, HydraException | OmegaConfBaseException):
        text = _hydras(error, cause)
        text = f"{key}: {text}" if key and key not in text else text
    else:
        text = str(cause)
    if "Original Traceback" in text:  # from a process that makes batches: its last line is the error itself
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(cause).__name__


def _chain(error: BaseException | None) -> list[Any]:
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _hydras(error: BaseException, cause: BaseException) -> str:
    """Hydra's and OmegaConf's complaints, in the words of the others."""
    text = "\n".join(str(e) for e in _chain(error))
    found = re.search(r"full_key: (\S+)", text)
    key = found[1] if found else "the value"
    if m := re.search(r"Value '(.*?)' of type '\w+' could not be converted to (\w+)", text):
        wanted = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}.get(m[2], m[2])
        return f"{key}={m[1]} must be {wanted}"
    if "Non optional field cannot be assigned None" in text or "is not Optional" in text:
        return f"{key}=null must have a value"
    if m := re.search(r"Error merging override (\S+)", text):
        if "is not a ListConfig" in text:
            return f"{m[1]} must be a list, e.g. {m[1].partition('=')[0]}=[4,2,1]"
    if m := re.search(r"Could not override '(\S+?)'|Key '\w+' (?:is )?not in '\w+'\s+full_key: (\S+)", text):
        return _unknown_key(m[1] or m[2])
    if isinstance(cause, ValueError | TypeError):
        return str(cause)
    return re.sub(r"^In '.*?': ", "", str(error)).split("Config search path")[0]


def _unknown_key(key: str) -> str:
    from pdistill.commands.settings import SETTINGS

    known = {name for settings in SETTINGS.values() for name in help_page.keys_of(settings)}
    near = difflib.get_close_matches(key.lstrip("+"), known, 1)
    return f"there is no key {key}{f', did you mean {near[0]}?' if near else ''} (--help lists them)"


def _needs_quotes(error: OverrideParseException) -> str:
    key, _, value = error.override.partition("=")
    character = next((c for c in value if not re.match(r"[\w/.:%+?*@$|\\ -]", c)), None)
    if character is None or character in "[]{}":
        return f"{error.override}: {str(error).partition(' See ')[0]}"
    return (
        f"{error.override}: the value holds {character!r}, which needs quotes inside of the shell's: "
        f"'{key}=\"{value}\"'"
    )


def _with_home(word: str) -> str:
    """key=~/x with the home directory, which shells expand at the beginning of words alone."""
    found = re.fullmatch(r"([\w.@/+-]+=)~(/.*)?", word)
    return f"{found[1]}{Path.home()}{found[2] or ''}" if found else word


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted("stopped; the same command continues from what is finished")


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
