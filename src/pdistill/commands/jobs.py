"""What a command does with one composed configuration, alone or as a job of a sweep in whatever process."""

import importlib
import math
import os
import re
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from pdistill.commands import run_directory
from pdistill.commands.complaints import USER_ERRORS, one_line
from pdistill.files import read_json, write_json
from pdistill.registry import import_parts

SWEEP = "PDISTILL_SWEEP"  # of a sweep's jobs, in whatever process: the directory of their results


def job(command: str) -> Callable[[DictConfig], float | None]:
    """What a command does with its configuration, after importing the modules that register the user's parts."""

    def run(cfg: DictConfig) -> float | None:
        import_parts(cfg.get("imports") or [])
        return importlib.import_module(f"pdistill.commands.{command}").main(cfg)

    return run


def prepare(arguments: list[str]) -> Path | None:
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


def run_job(command: str, cfg: DictConfig, program: list[str]) -> float | None:
    """One job of a sweep, in this process or a launcher's; leaves its result for the table."""
    hydra_cfg, overrides = HydraConfig.get(), list(HydraConfig.get().overrides.task)
    params = list(map(str, hydra_cfg.sweeper.get("params") or {}))
    os.environ[run_directory.SWEPT] = " ".join({*os.environ.get(run_directory.SWEPT, "").split(), *params})
    typed = run_directory.typed_overrides(overrides)
    if "name" in typed and cfg.get("name"):
        cfg.name = run_directory.sweep_name(typed["name"], overrides)
    print(f"\nsweep, job {hydra_cfg.job.num}: {' '.join(overrides)}", flush=True)
    value, error = _value_or_error(command, cfg, program, overrides)
    if cfg.get("name"):
        names = {k: v for k, v in hydra_cfg.runtime.choices.items() if "/" not in k and v}
        choices = {k: v for k, v in typed.items() if k != "name"}
        result = {"name": cfg.name, "output_root": cfg.get("output_root", "outputs"), "error": error}
        result |= {"groups": names, "choices": choices, "value": value}
        write_json(_results(cfg) / f"{hydra_cfg.job.num:05d}.json", result)
    return math.nan if error else value


def _value_or_error(
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


def _outside_conf() -> list[str]:
    """The words of the command line that say where else configurations are."""
    config = HydraConfig.get()
    words = [o for o in config.overrides.hydra if o.lstrip("+").startswith("hydra.searchpath")]
    given = [s.path for s in config.runtime.config_sources if s.provider == "command-line"]
    return [*(word for path in given for word in ("--config-dir", path)), *words]


def finish(sweep: Path) -> None:
    """The table over the jobs of a sweep, in whatever process they ran. Raises UserError if one failed."""
    from pdistill.commands import sweep as table

    roots = [Path(o.partition("=")[2]) for o in sys.argv if o.startswith("output_root=")] or [Path("outputs")]
    folder = roots[0].expanduser() / ".multirun" / sweep.name
    results: list[Any] = [read_json(path) for path in sorted(folder.glob("*.json"))]
    if results:
        table.finish([table.Job.of_result(result) for result in results])
