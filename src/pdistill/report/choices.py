"""What runs were made of, by the names of the parts, and what tells several runs apart.

A run of 0.2.0 and later keeps the names in run.json, group by group; those of an earlier run follow from what its
configuration names by import path.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdistill import registry
from pdistill.errors import UserError

Config = Mapping[str, Any]  # a run's config.yaml as plain dicts and lists
NO_DIFFERENCE = (  # keys and groups that say where a run is, or who watches, and not what it computes
    "name",
    "output_root",
    "overwrite",
    "imports",
    "logger",
    "num_workers",
    "checkpoint_every_n_updates",
    "samples_every_n_updates",
    "max_batch_per_device",
    "compile",
    "compile_mode",
    "channels_last",
    "gradient_checkpointing",
    "matmul_precision",
    "allow_unstable",
    "skip_nonfinite",  # a run that ends without it ends alike with it
    "skip_nonfinite_in_a_row",
    "dataset.cache",
)
PATH_OF_DATA = "dataset.path"  # of no interest where run.json knows the data by their content
BY_THEIR_KEYS = ("experiment", "trainer")  # groups whose name says less than the keys that they set
ALWAYS = ("parameterization", "weighting")  # stand in every table
BEFORE_GROUPS = {"method": "halving", "optimizer": "adamw"}  # of runs older than these groups
MOVED = {  # what configurations of version 0.1.0 name
    "pdistill.huggingface.load": "pdistill.dataset.huggingface.load",
    "pdistill.extractors.train_classifier": "pdistill.metrics.classifier.train_classifier",
    "pdistill.extractors.inception": "pdistill.metrics.extractors.inception",
    "pdistill.logger.wandb_logger": "pdistill.training.logger.wandb_logger",
}


def silent(key: str) -> bool:
    """True for a key of the configuration, or a group, that makes no difference to a run's result."""
    head, _, rest = key.partition(".")
    where = head in NO_DIFFERENCE or key in NO_DIFFERENCE or head.startswith("hydra")
    return where or (head == "trainer" and rest not in ("", "precision"))


def flat(config: Config, prefix: str = "") -> dict[str, str]:
    """The configuration as dotted keys and text."""
    keys: dict[str, str] = {}
    for key, value in config.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return keys


def names_of(config: Config) -> dict[str, str]:
    """The parts that a configuration names by import path, group -> name.

    A part that is not known here has the last part of its path as its name.
    """
    names = {}
    for group, node in config.items():
        path = _path(node)
        if path is not None and not silent(group) and group not in BY_THEIR_KEYS:
            names[group] = _name(group, path)
    return names


def _path(node: object) -> str | None:
    """What a group's node instantiates; of metrics, its extractor. None where it instantiates nothing."""
    if not isinstance(node, Mapping):
        return None
    if "extractor" in node:
        return _path(node["extractor"])
    target = node.get("_target_")
    if not isinstance(target, str):
        return None
    named = node.get("path") if target.startswith("hydra.utils.get_") else None
    if target.startswith("pdistill.registry."):
        named = node.get("name")
    return named if isinstance(named, str) else target


def _name(group: str, path: str) -> str:
    path = MOVED.get(path, path)
    module, _, attribute = path.rpartition(".")
    try:
        known = registry.name_of(group, f"{module}:{attribute}")
    except UserError:  # no group that parts are registered in
        known = None
    return known or attribute


@dataclass(frozen=True)
class Made:
    """What a run was made of: its configuration, and its run.json, which is empty for a run of 0.1.0."""

    config: Config
    facts: Mapping[str, Any]

    @property
    def choices(self) -> dict[str, str] | None:
        """The names of its parts, if it keeps them."""
        kept = self.facts.get("choices")
        return {k: str(v) for k, v in kept.items() if not silent(k)} if isinstance(kept, Mapping) else None

    @property
    def older(self) -> bool:
        """Whether it is of 0.1.0."""
        return "optimizer" not in self.config

    @property
    def derived(self) -> dict[str, str]:
        """The names of its parts by the import paths in its configuration."""
        return (BEFORE_GROUPS if self.older else {}) | names_of(self.config)

    @property
    def keys(self) -> dict[str, str]:
        """Its configuration as dotted keys, with what paths lead to instead of the paths, where that is known."""
        keys = {k: v for k, v in flat(self.config).items() if not silent(k)}
        keys |= {k: str(self.facts[k]) for k in ("teacher", "start") if self.facts.get(k)}
        if self.facts.get("data"):
            keys = {k: v for k, v in keys.items() if k != PATH_OF_DATA} | {"data": str(self.facts["data"])}
        return keys


def tell_apart(runs: Sequence[Made]) -> list[dict[str, str]]:
    """Of each run the names of its parts, and the keys that differ; keys that follow from a choice are left out."""
    if all(run.choices for run in runs):
        known = [{k: v for k, v in run.derived.items() if k in ALWAYS} | (run.choices or {}) for run in runs]
        names = [{k: v for k, v in of_run.items() if k not in BY_THEIR_KEYS} for of_run in known]
    else:  # alike for all, so that a name kept here and derived there is no difference
        names = [run.derived | {k: v for k, v in (run.choices or {}).items() if k in ALWAYS} for run in runs]
    keys, differing = [run.keys for run in runs], []
    for key in sorted({key for of_run in keys for key in of_run}):
        # a key that a run of 0.1.0 does not have is new, and had no other value then
        values = {k.get(key, "") for k, run in zip(keys, runs, strict=True) if key in k or not run.older}
        if len(values) > 1 and not _follows(key, keys, names):
            differing.append(key)
    return [n | {key: k.get(key, "") for key in differing} for n, k in zip(names, keys, strict=True)]


def _follows(key: str, keys: list[dict[str, str]], names: list[dict[str, str]]) -> bool:
    """True if all runs with one choice of the key's group have one value of it: the choice says it."""
    group = "dataset" if key == "data" else key.partition(".")[0]
    values: dict[str, set[str]] = {}
    for of_run, chosen in zip(keys, names, strict=True):
        if group not in chosen:
            return False
        values.setdefault(chosen[group], set()).add(of_run.get(key, ""))
    return all(len(found) == 1 for found in values.values())
