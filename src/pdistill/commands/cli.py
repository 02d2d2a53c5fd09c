"""What the command-line entry points share: composing, one-line errors, sweeps."""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pdistill import run as run_directory
from pdistill import sweep
from pdistill.errors import Interrupted, UserError

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException)


def run(job: Callable[[DictConfig], object], config_name: str) -> None:
    """Composes conf/<config_name>.yaml with the command line and calls `job`; ends the process.

    A user's mistake, Hydra's own complaints included, is one line on stderr and a non-zero exit status. In a
    multirun a failed job does not end the sweep; the sweep's table lists it.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through, to be told here in one line
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    conf = Path(sys.argv[0]).resolve().parent / "conf"
    results: list[sweep.Job] = []
    failure: list[Exception] = []

    @hydra.main(version_base="1.3", config_path=str(conf), config_name=config_name)
    def main(cfg: DictConfig) -> None:
        hydra_cfg = HydraConfig.get()
        if hydra_cfg.mode == RunMode.RUN:
            try:
                job(cfg)
            except USER_ERRORS as error:  # kept from Hydra, which would print a line of its own
                failure.append(error)
            return
        overrides = list(hydra_cfg.overrides.task)
        print(f"\nsweep, job {hydra_cfg.job.num}: {' '.join(overrides)}")
        error = _run_sweep_job(job, cfg, overrides)
        groups = {k: hydra_cfg.runtime.choices.get(k) for k in ("dataset", "parameterization", "weighting")}
        typed = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o)
        results.append(sweep.Job(cfg.get("name"), groups | typed, error))

    try:
        main()
        if failure:
            raise failure[0]
        if results and results[0].name:
            sweep.finish(results)
    except (*USER_ERRORS, Interrupted) as error:
        sys.exit(_tell(error))


def _run_sweep_job(job: Callable[[DictConfig], object], cfg: DictConfig, overrides: list[str]) -> str | None:
    """Runs one job of a sweep; its error in a line, or None.

    With several devices the job gets a process of its own: Lightning starts the other ranks by this process's
    command line, which would run the whole sweep again in each of them.
    """
    if cfg.get("trainer") and cfg.trainer.devices != 1:
        status = subprocess.run([sys.executable, sys.argv[0], *overrides]).returncode
        return None if status == 0 else f"exit status {status}"
    try:
        job(cfg)
    except USER_ERRORS as error:
        _tell(error)
        return one_line(error)
    except Exception as error:  # a bug of ours or a machine's limit: the other jobs are worth finishing
        traceback.print_exc()
        return one_line(error)
    return None


def _tell(error: BaseException) -> int:
    """Prints the error's line and gives its exit status; of an error inside `instantiate`, its cause."""
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    if run_directory.is_main_process():
        print(f"error: {one_line(cause if isinstance(cause, UserError | ValueError) else error)}", file=sys.stderr)
    return getattr(cause, "exit_code", 2)


def one_line(error: BaseException) -> str:
    text = str(error).split("Config search path")[0]
    if isinstance(error, OverrideParseException):
        quoted = "a value with = , : or blanks needs quotes inside of the shell's, 'key=\"a=b\"'"
        text = f"{error.override}: {quoted} ({text.partition(' See ')[0]})"
    if "Original Traceback" in text:  # from a process that makes batches: its last line is the error itself
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted("stopped; the same command continues from the last checkpoint")
