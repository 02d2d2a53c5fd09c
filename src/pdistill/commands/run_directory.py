"""The run directory `outputs/<name>/`: its name, its configuration, and who may write to it."""

import fcntl
import os
import re
import shutil
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pdistill.errors import UserError

# Groups that say what is computed; the others say where, or who watches.
NAMED_GROUPS = ("dataset", "network", "schedule", "parameterization", "weighting", "steps", "metrics")
# Keys that change nothing in the result, and so may differ when a run is resumed.
UNCOMPARED = (
    "name",
    "overwrite",
    "trainer",
    "logger",
    "num_workers",
    "checkpoint_every_n_updates",
    "max_batch_per_device",
)


def run_name() -> str:
    """The default of `name`: the experiment, or the main groups, and every override that was typed.

    No time stamp: the same command has the same name, and so resumes. Nothing in it needs quotes in an override.
    """
    hydra = HydraConfig.get()
    choices, typed = hydra.runtime.choices, dict(o.lstrip("+~").split("=", 1) for o in hydra.overrides.task if "=" in o)
    if choices.get("experiment"):
        parts = [choices["experiment"].replace("/", "_")] + [choices[g] for g in NAMED_GROUPS if g in typed]
    else:
        always = ("dataset", "parameterization", "weighting", "schedule", "steps")
        parts = [choices[g] for g in always] + [choices[g] for g in ("network", "metrics") if g in typed]
    if hydra.job.config_name == "train":
        parts.append("teacher")
    silent = (*NAMED_GROUPS, *UNCOMPARED, "experiment")
    parts += [
        f"{k}-{v}"
        for k, v in sorted(typed.items())
        if k.split(".")[0] not in silent or ("." in k and k.split(".")[0] in NAMED_GROUPS)
    ]
    name = re.sub(r"[\[\]'\"]", "", "-".join(parts))
    return re.sub(r"[^\w.+-]+", "_", name).strip("_")[:200]


OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def is_main_process() -> bool:
    """False in the processes that Lightning starts for further devices."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


def find(cfg: DictConfig, result: str) -> tuple[Path, bool]:
    """outputs/<name>, and whether the run there is finished, that is, holds the file `result`.

    Raises UserError for a name that is not a plain directory name, and, unless cfg.overwrite, for a directory
    that is no run or holds one with another configuration.
    """
    name = str(cfg.name)
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise UserError(f"name={name} must be one directory name of letters, digits and . + - _")
    directory = Path("outputs") / name
    if cfg.overwrite or not directory.exists():
        return directory, False
    if not (directory / "config.yaml").exists():
        raise UserError(f"{directory} exists and is no run of pdistill (no config.yaml): choose another name=...")
    ours, theirs = (flat(c) for c in (cfg, OmegaConf.load(directory / "config.yaml")))
    differing = [
        f"{k}: {ours.get(k, 'absent')}, was {theirs.get(k, 'absent')}"
        for k in sorted(ours.keys() | theirs.keys())
        if ours.get(k, "absent") != theirs.get(k, "absent")
    ]
    if differing:
        raise UserError(
            f"{directory} holds a run with another configuration ({'; '.join(differing)}): "
            f"choose another name=..., or overwrite=true to delete it and start afresh"
        )
    return directory, (directory / result).exists()


def flat(cfg: DictConfig) -> dict[str, str]:
    """What decides a run's result, as dotted keys; UNCOMPARED is left out."""
    flat = {}

    def visit(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                visit(f"{prefix}.{k}" if prefix else k, v)
        else:
            flat[prefix] = str(value)

    visit("", {k: v for k, v in OmegaConf.to_container(cfg, resolve=True).items() if k not in UNCOMPARED})
    return flat


def open_directory(cfg: DictConfig, directory: Path) -> None:
    """Makes the directory and writes config.yaml, and holds it against other processes until this one ends.

    With `overwrite`, what stood there is deleted. Raises UserError if another process is writing to it.
    """
    if not is_main_process():
        return
    Path("outputs").mkdir(exist_ok=True)
    lock = (Path("outputs") / f".{directory.name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"{directory} is being written by another process: wait for it, or choose another name=..."
        ) from error
    open_directory.lock = lock  # held until the process ends, or opens another
    if cfg.overwrite and (directory / "config.yaml").exists():
        shutil.rmtree(directory)
    directory.mkdir(exist_ok=True)
    temporary = directory / "config.yaml.partial"
    OmegaConf.save(cfg, temporary, resolve=True)
    temporary.replace(directory / "config.yaml")


def outputs() -> Path:
    """Stands in for the lead's until the merge."""
    return Path("outputs")
