"""The run directory `<output_root>/<name>/`: what it was made of, and who may write to it.

config.yaml is the composed configuration; run.json the facts that no configuration tells: the version, the names that
were chosen in each group, and what the given teacher and the data were, by their content.
"""

import fcntl
import io
import os
import re
import shutil
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from pdistill import __version__
from pdistill.commands.identity import digest_of_denoiser, is_imported
from pdistill.commands.names import NAMED_GROUPS, UNCOMPARED
from pdistill.commands.settings import conf
from pdistill.errors import UserError, first_line
from pdistill.files import read_json, remove_partial, whole, write_json
from pdistill.processes import is_main
from pdistill.reading import text_of
from pdistill.report import choices
from pdistill.report.choices import MOVED
from pdistill.report.runs import rows_of
from pdistill.steps import TEACHERS

BY_CONTENT = ("teacher", "dataset.path", "dataset.cache", "start")  # paths: what they lead to is compared instead
MOST_YAML = 1024**2  # bytes of a config.yaml, which has some thousand


def directory_of(name: str, output_root: str) -> Path:
    """The run's directory. Raises UserError for a name that is not a plain directory name."""
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith(".") or len(name.encode()) > 200:
        raise UserError(
            f"name={name} must be one directory name of letters, digits and . + - _, at most 200 bytes, e.g. name=first"
        )
    directory = Path(output_root).expanduser() / name
    there = next(p for p in (directory, *directory.resolve().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{there} is no directory that may be written to: give another output_root=<directory>")
    return directory


def find(cfg: DictConfig, result: str) -> tuple[Path, bool]:
    """The run's directory, and whether the run there is finished, that is, holds the file `result`.

    Raises UserError for a name that is not a plain directory name, and, unless cfg.overwrite, for a directory
    that is no run, holds one with another configuration or teacher, or an unfinished one of another version.
    """
    directory = directory_of(str(cfg.name), cfg.output_root)
    if cfg.overwrite or not directory.exists() or _is_not_begun(directory):
        return directory, False
    finished = (directory / result).exists()
    if is_main():
        _check_same(cfg, directory, finished)
    return directory, finished


def _is_not_begun(directory: Path) -> bool:
    """Whether it is empty, or holds what a run leaves that was killed before it wrote its configuration."""
    left = ("run.json", ".*.partial")
    return directory.is_dir() and all(any(path.match(name) for name in left) for path in directory.iterdir())


def _check_same(cfg: DictConfig, directory: Path, finished: bool) -> None:
    if not directory.is_dir() or not (directory / "config.yaml").exists():
        raise UserError(f"{directory} exists and is no run of pdistill (no config.yaml): choose another name=...")
    facts = facts_of(directory)
    if facts["version"].split(".")[:2] != __version__.split(".")[:2] and not finished:
        raise UserError(
            f"{directory} is an unfinished run of version {facts['version']}, which version {__version__} cannot "
            f"resume: finish it with that version, choose another name=..., or overwrite=true to start again"
        )
    ours, theirs = flat(cfg), _flat(config_of(directory))
    theirs = {k: v for k, v in _defaults(cfg).items() if k in ours} | theirs
    keys = ours.keys() | theirs.keys() if facts["version"] == __version__ else ours.keys() & theirs.keys()
    differing = [
        f"{k}: {ours.get(k, 'absent')}, was {theirs.get(k, 'absent')}"
        for k in sorted(keys - set(BY_CONTENT))
        if ours.get(k, "absent") != theirs.get(k, "absent")
    ]
    for key in ("teacher", "start"):
        now = digest_of_denoiser(cfg.get(key), cfg.get("teacher_revision"))
        if now is None and cfg.get(key) is not None:  # on the hub, and not fetched yet
            continue
        if now != facts.get(key) and ("teacher" in facts or (now is None) != (theirs.get(key, "None") == "None")):
            differing.append(f"{key}: {cfg.get(key)} holds other weights now ({now}), was {facts.get(key)}")
    if differing:
        hint = f", start={directory}/teacher/denoiser to train on from its teacher" if finished else ""
        raise UserError(
            f"{directory} holds a run with another configuration ({'; '.join(differing)}): "
            f"choose another name=...{hint}, or overwrite=true to delete it and start again"
        )
    if finished and cfg.dataset.get("path") is not None:
        try:
            data = instantiate(cfg.dataset)
        except Exception:  # moved or deleted: the finished run does not need it
            return
        check_data(directory, data.fingerprint)


def _defaults(cfg: DictConfig) -> dict[str, str]:
    """The defaults of all keys, as dotted keys: what a run did without the keys that are younger than it is."""
    kind, keys = OmegaConf.get_type(cfg), {}
    if is_dataclass(kind):
        section: Any = OmegaConf.to_container(OmegaConf.structured(kind), enum_to_str=True)
        keys = choices.flat(section)
    for group, choice in HydraConfig.get().runtime.choices.items() if HydraConfig.initialized() else ():
        file = conf() / group / f"{choice}.yaml"
        if group in NAMED_GROUPS and file.exists():
            node: Any = OmegaConf.to_container(OmegaConf.load(file))
            keys |= choices.flat(node, f"{group}.")
    return keys


def check_data(directory: Path, fingerprint: str) -> None:
    """Raises UserError where the run in `directory` was begun with other images."""
    before = facts_of(directory).get("data") if (directory / "run.json").exists() else None
    if before not in (None, fingerprint):
        raise UserError(
            f"{directory} was begun with other data (fingerprint {before}, now {fingerprint}): images were added, "
            f"removed or changed. Restore them, choose another name=..., or overwrite=true to start again"
        )


def config_of(directory: Path) -> dict[str, Any]:
    """The configuration of a run, in today's words, as plain data. Raises UserError for a missing or damaged one.

    Nothing in it is resolved or imported: it was written resolved, and "${oc.env:HOME}" in it is a text. Aliases, which
    are not written either, are refused: a few lines of them can stand for more than any memory holds.
    """
    file = directory / "config.yaml"
    try:
        text = text_of(file, MOST_YAML)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it holds aliases")
        config: Any = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
        _with_todays_targets(config)
    except FileNotFoundError as error:
        raise UserError(f"{directory} is no run: it holds no config.yaml") from error
    except Exception as error:  # YAML's own, of many kinds
        raise UserError(f"{file} is damaged ({first_line(error, 100)}): restore it, or delete the run") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is damaged: restore it, or delete the run")
    return config


def _with_todays_targets(node: Any) -> None:
    """Replaces, in place, what version 0.1.0 named by where it was."""
    for key, value in node.items():
        if isinstance(value, dict):
            _with_todays_targets(value)
        elif key in ("_target_", "path") and isinstance(value, str) and value in MOVED:
            node[key] = MOVED[value]


def facts_of(directory: Path) -> dict[str, Any]:
    """The facts of a run; of one that version 0.1.0 wrote, the version alone."""
    cure = "restore it, or give overwrite=true to start again"
    facts = read_json(directory / "run.json", {"version": "0.1.0"}, cure)
    if not isinstance(facts, dict) or not isinstance(facts.get("version"), str):
        raise UserError(f"{directory / 'run.json'} is damaged (it says no version): {cure}")
    return facts


def flat(cfg: DictConfig) -> dict[str, str]:
    """What decides a run's result, as dotted keys; UNCOMPARED is left out."""
    container: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return _flat(container)


def _flat(config: dict[str, Any]) -> dict[str, str]:
    unused = () if "teacher" in config else ("distillation", "method")  # of a run that trains a teacher alone
    return choices.flat({k: v for k, v in config.items() if k not in (*UNCOMPARED, *unused)})


class Writing:
    """Holds a run's directory against other processes until `close`, or the end of this one."""

    def __init__(self, cfg: DictConfig, directory: Path, data: str) -> None:
        """Makes the directory and writes config.yaml and run.json; only the main process does.

        With `overwrite`, what stood there is deleted. Raises UserError if another process is writing to it, or it holds
        a run with other data.
        """
        self.lock = None
        if not is_main():
            return
        teacher = digest_of_denoiser(cfg.get("teacher"), cfg.get("teacher_revision"))
        if not cfg.overwrite and (directory / "config.yaml").exists():
            check_data(directory, data)
            _check_teacher(directory, cfg.get("teacher"), teacher)
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.lock = (directory.parent / f".{directory.name}.lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{directory} is being written by another process: wait for it, or choose another name=..."
            ) from error
        if cfg.overwrite and (directory / "config.yaml").exists():
            shutil.rmtree(directory)
        os.register_at_fork(after_in_child=self.close)  # those that make batches outlive a killed process for a while
        directory.mkdir(exist_ok=True)
        remove_partial(directory)
        if not all((directory / file).exists() for file in ("run.json", "config.yaml")):
            hydra = HydraConfig.get() if HydraConfig.initialized() else None
            write_json(
                directory / "run.json",
                {
                    "version": __version__,
                    "choices": _choices(cfg),
                    "overrides": list(hydra.overrides.task) if hydra else [],
                    "teacher": teacher,
                    "start": digest_of_denoiser(cfg.get("start")),
                    "data": data,
                },
            )
        with whole(directory / "config.yaml") as temporary:
            OmegaConf.save(cfg, temporary, resolve=True)

    def close(self) -> None:
        """Lets others write."""
        if self.lock is not None:
            self.lock.close()


def _choices(cfg: DictConfig) -> dict[str, str | None]:
    """The names that were chosen in each group, or that a diffusers teacher brought."""
    if not HydraConfig.initialized():
        return {}
    chosen = {k: v for k, v in HydraConfig.get().runtime.choices.items() if "/" not in k}
    if is_imported(cfg.get("teacher")):
        chosen |= {k: str(cfg[k]) for k in ("network", "schedule")}
        chosen |= choices.names_of({"parameterization": OmegaConf.to_container(cfg.parameterization)})
    return chosen


def _check_teacher(directory: Path, teacher: str | None, digest: str | None) -> None:
    """Of a model on the hub, which is known by its content only once it is fetched."""
    before = facts_of(directory).get("teacher") if (directory / "run.json").exists() else None
    if before not in (None, digest):
        raise UserError(
            f"{directory} was begun with teacher={teacher} at {before}, and it is at {digest} now: give "
            f"teacher_revision={before}, another name=..., or overwrite=true to start again"
        )


def last_metric(directory: Path) -> float | None:
    """The metric of the last stage that is finished: what a sweep optimises. None where nothing was measured."""
    rows = rows_of(directory)
    if not rows:
        return None
    last = min(rows, key=lambda row: (row["stage"] in TEACHERS, row["num_steps"]))
    return next((float(v) for k, v in last.items() if k.startswith("fid") and isinstance(v, int | float)), None)
