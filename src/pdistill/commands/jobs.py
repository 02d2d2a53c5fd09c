"""What a command does with one composed configuration, alone or as a job of a sweep in whatever process."""

import contextlib
import importlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from omegaconf import DictConfig

from pdistill import processes
from pdistill.commands import names, run_directory
from pdistill.commands.complaints import USER_ERRORS, cause_of, not_installed, one_line
from pdistill.commands.stopping import end_where_nothing_does, requeued, what_remains
from pdistill.display import JOB
from pdistill.errors import Interrupted, UserError, first_line
from pdistill.faults import in_words
from pdistill.files import locked, read_json, write_json
from pdistill.lazy import quick_imports
from pdistill.processes import is_main
from pdistill.registry import import_parts

COUNTS = "PDISTILL_SWEEP_COUNTS"  # of a sweep: how many values each of its keys has, as JSON
SWEEP = "PDISTILL_SWEEP"  # of a sweep's jobs, in whatever process: the directory of their results
STARTED_BY = "PDISTILL_SWEEP_PID"
IMPORT_LATER = ("train", "distill")  # torch, and only for a run that is not finished
NOT_ENDED = "its process ended before it did"
# Hydra finds that a launcher's keys in conf/ are those of its plugin: as they should be.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


def job(command: str) -> Callable[[DictConfig], float | None]:
    """What a command does with its configuration, after importing the modules that register the user's parts."""

    def run(cfg: DictConfig) -> float | None:
        import_parts(cfg.get("imports") or [])
        with in_words(command, "use a smaller batch_size, or a device with more"):
            with contextlib.nullcontext() if command in IMPORT_LATER else quick_imports():
                module = importlib.import_module(f"pdistill.commands.{command}")
            return module.main(cfg)

    return run


def prepare(arguments: list[str]) -> Path | None:
    """Of a multirun: the directory of its jobs' results, in the environment, which jobs in other processes inherit."""
    if not ({"-m", "--multirun"} & set(arguments) or any("hydra.mode=MULTIRUN" in a for a in arguments)):
        return None
    if (there := processes.launched()) and there.by == "torchrun" and there.processes > 1:
        raise UserError(
            "-m starts the jobs of a sweep one after another, and torchrun knows one job: leave torchrun out, and each "
            "job with several devices starts its processes itself"
        )
    words = [a for a in arguments if "=" in a and not a.startswith("-")]
    counts = _choices_of(words)
    os.environ[names.SWEPT], os.environ[COUNTS] = " ".join(counts), json.dumps(counts)
    os.environ[SWEEP], os.environ[STARTED_BY] = uuid.uuid4().hex[:8], str(os.getpid())
    if any(re.match("hydra/launcher=submitit", a) for a in arguments):
        print("what the jobs print is in outputs/.multirun/.submitit, or below another output_root", flush=True)
    return Path(os.environ[SWEEP])


def _choices_of(words: list[str]) -> dict[str, int | None]:
    """The keys that a sweep varies, and how many values each has; None where that is not known here (glob)."""
    varied = [o for o in OverridesParser.create().parse_overrides(words) if o.is_sweep_override()]
    counted = (o.is_discrete_sweep() and not isinstance(o.value(), Glob) for o in varied)
    return {
        str(o.key_or_group): len(list(o.sweep_iterator())) if known else None
        for o, known in zip(varied, counted, strict=True)
    }


@contextlib.contextmanager
def _numbered() -> Iterator[None]:
    """Lets the display of a job, in this process or in one of its own, say which it is."""
    os.environ[JOB] = _number()
    try:
        yield
    finally:
        del os.environ[JOB]


def _number() -> str:
    """Of this job, "2/6"; "2" where a sweeper of another kind decides how many there are."""
    config = HydraConfig.get()
    number, params = str(config.job.num + 1), config.sweeper.get("params") or {}
    if not str(config.sweeper.get("_target_")).endswith("BasicSweeper"):
        return number
    counts = _choices_of([f"{key}={value}" for key, value in params.items()]) | json.loads(os.environ.get(COUNTS, "{}"))
    known = [count for count in counts.values() if count is not None]
    return f"{number}/{math.prod(known)}" if len(known) == len(counts) else number


def _results(cfg: DictConfig) -> Path:
    return Path(cfg.get("output_root", "outputs")).expanduser().resolve() / ".multirun" / os.environ[SWEEP]


def run_job(command: str, cfg: DictConfig, program: list[str]) -> float | None:
    """One job of a sweep, in this process or a launcher's; leaves its result for the table."""
    hydra_cfg, overrides = HydraConfig.get(), list(HydraConfig.get().overrides.task)
    params = list(map(str, hydra_cfg.sweeper.get("params") or {}))
    os.environ[names.SWEPT] = " ".join({*os.environ.get(names.SWEPT, "").split(), *params})
    typed = names.typed_overrides(overrides)
    if "name" in typed and cfg.get("name"):
        cfg.name = names.sweep_name(typed["name"], overrides)
    elsewhere = os.environ.get(STARTED_BY) != str(os.getpid())  # in a process of the sweep's launcher
    if elsewhere:
        end_where_nothing_does(what_remains(command))
    if is_main():
        print(f"\nsweep, job {hydra_cfg.job.num}: {' '.join(overrides)}", flush=True)
    groups = {k: v for k, v in hydra_cfg.runtime.choices.items() if "/" not in k and v}
    choices = {k: v for k, v in typed.items() if k != "name"}
    result = {"name": cfg.get("name"), "output_root": cfg.get("output_root", "outputs"), "groups": groups}
    result |= {"choices": choices, "value": None, "error": NOT_ENDED, "process": [socket.gethostname(), os.getpid()]}
    with _noting(cfg, result) as noted, _numbered():
        try:
            value, error = _value_or_error(command, cfg, program, overrides)
        except Interrupted as stopped:
            if elsewhere:
                _hand_on(stopped)
            raise
        noted |= {"value": value, "error": error}
    return _for_sweeper(value, error)


@contextlib.contextmanager
def _noting(cfg: DictConfig, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A job's result, for the table: written before and after it runs, so that a process that is killed leaves one.

    While the job runs, a lock says so to the process that waits for it.
    """
    if not is_main():
        yield result
        return
    file = _results(cfg) / f"{HydraConfig.get().job.num:05d}.json"
    write_json(file, result)
    with locked(file.with_suffix(".lock")):
        try:
            yield result
        finally:
            write_json(file, result)


def _hand_on(stopped: Interrupted) -> None:
    """Lets a cluster run a job again that it stopped: submitit has a signal of its own, the others are Slurm's."""
    if stopped.signal == signal.SIGUSR2:
        signal.raise_signal(signal.SIGUSR2)
    print(f"error: {stopped}{requeued(stopped)}", file=sys.stderr, flush=True)


def _for_sweeper(value: float | None, error: str | None) -> float | None:
    """What a job returns to Hydra: not a number where it failed; to Optuna nothing, which is its word for failed."""
    if "optuna" in str(HydraConfig.get().sweeper.get("_target_")):
        return value if error is None and value is not None and math.isfinite(value) else None
    return math.nan if error else value


def _value_or_error(
    command: str, cfg: DictConfig, program: list[str], overrides: list[str]
) -> tuple[float | None, str | None]:
    """The job's value, and its error in a line or None.

    With several devices the job gets a process of its own: Lightning starts the other ranks by this process's
    command line, which would run the whole sweep again in each of them.
    """
    try:
        devices, nodes = _counts(cfg)
    except USER_ERRORS as error:
        return None, one_line(error)
    if devices != 1 or nodes != 1:
        words = [o for o in overrides if not re.match(r"[+~]*name=", o)] + ([f"name={cfg.name}"] if cfg.name else [])
        status = _status_of([*program, *_outside_conf(), *words])
        if status != 0:
            return None, f"exit status {status}, its line of error is above"
        directory = run_directory.directory_of(cfg.name, cfg.output_root) if cfg.get("trainer") else None
        return (None if directory is None else run_directory.last_metric(directory)), None
    try:
        return job(command)(cfg), None
    except USER_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return None, one_line(error)
    except Exception as error:  # a bug of ours or a machine's limit: the other jobs are worth finishing
        traceback.print_exc()
        return None, one_line(error)


def _counts(cfg: DictConfig) -> tuple[int, int]:
    if not cfg.get("trainer"):
        return cfg.get("devices", 1), 1
    return cfg.trainer.devices, cfg.trainer.get("num_nodes", 1)


def _status_of(words: list[str]) -> int:
    """The exit status of a job in a process of its own, to which signals are passed on."""
    environment = {k: v for k, v in os.environ.items() if k not in (SWEEP, STARTED_BY, names.SWEPT)}
    process = subprocess.Popen([sys.executable, *words], env=environment)
    try:
        return process.wait()
    except Interrupted as stopped:
        process.send_signal(stopped.signal or signal.SIGTERM)
        process.wait()
        raise


def _outside_conf() -> list[str]:
    """The words of the command line that say where else configurations are."""
    config = HydraConfig.get()
    words = [o for o in config.overrides.hydra if o.lstrip("+").startswith("hydra.searchpath")]
    given = [s.path for s in config.runtime.config_sources if s.provider == "command-line"]
    return [*(word for path in given for word in ("--config-dir", path)), *words]


def run_all(composed: Callable[[], Any], sweep: Path | None, arguments: list[str]) -> str | None:
    """Runs what Hydra composed, once or as the jobs of a sweep; a complaint of the sweep's launcher or sweeper.

    Errors of jobs are in their results.
    """
    try:
        composed()
    except (*USER_ERRORS, Interrupted):
        raise
    except Exception as error:
        plugins = [a for a in arguments if re.match(r"hydra/(launcher|sweeper)=", a)]
        if sweep is None or not plugins:
            raise
        if missing := not_installed(str(error), plugins):
            raise UserError(missing) from error
        return f"{' '.join(plugins)}: {first_line(cause_of(error))}"
    return None


def finish(command: str, sweep: Path, complaint: str | None) -> None:
    """The table over the jobs of a sweep, in whatever process they ran. Raises UserError if one failed."""
    if not is_main():
        return
    from pdistill.commands import sweep as table

    roots = [Path(o.partition("=")[2]) for o in sys.argv if o.startswith("output_root=")] or [Path("outputs")]
    folder = roots[0].expanduser() / ".multirun" / sweep.name
    for lock in sorted(folder.glob("*.lock")):  # where the launcher gave up, others may still run
        with locked(lock):
            pass
    files = sorted(folder.glob("*.json"))
    try:
        if files and command in ("train", "distill"):
            runs = {job.name: job for job in table.results_in(folder)}  # a search may try the same twice
            table.finish(list(runs.values()))
        elif failed := [f"{k} ({error})" for k, file in enumerate(files) if (error := read_json(file)["error"])]:
            raise UserError(f"{len(failed)} of {len(files)} jobs failed: {', '.join(failed)}")
    except UserError as error:
        raise UserError(f"{complaint}; {error}" if complaint else str(error)) from error
    if complaint:
        raise UserError(complaint)
