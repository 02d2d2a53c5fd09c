"""What runs were made of, by the names of the parts, and what tells several runs apart.

A run of 0.2.0 and later keeps the names in run.json, group by group; those of an earlier run follow from what its
configuration names by import path.
"""

from collections.abc import Mapping, Sequence
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
    "max_batch_per_device",
)
BY_THEIR_KEYS = ("experiment", "trainer")  # groups whose name says less than the keys that they set
ALWAYS = ("parameterization", "weighting")  # stand in every table
BEFORE_GROUPS = {"method": "halving", "optimizer": "adamw"}  # of runs older than these groups
MOVED = {
    "pdistill.huggingface.": "pdistill.dataset.huggingface.",
    "pdistill.extractors.": "pdistill.metrics.extractors.",
}


def silent(key: str) -> bool:
    """True for a key of the configuration, or a group, that makes no difference to a run's result."""
    head, _, rest = key.partition(".")
    return head in NO_DIFFERENCE or head.startswith("hydra") or (head == "trainer" and rest not in ("", "precision"))


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
    for old, new in MOVED.items():
        path = new + path.removeprefix(old) if path.startswith(old) else path
    module, _, attribute = path.rpartition(".")
    try:
        known = registry.name_of(group, f"{module}:{attribute}")
    except UserError:  # no group that parts are registered in
        known = None
    return known or attribute


def tell_apart(runs: Sequence[tuple[Config, Mapping[str, str] | None]]) -> list[dict[str, str]]:
    """Of each run (configuration, choices of its run.json or None) the names of its parts, and the keys that differ.

    Keys that follow from a group's choice are left out.
    """
    configs = [flat(config) for config, _ in runs]
    older = ["optimizer" not in config for config, _ in runs]  # of 0.1.0
    derived = [(BEFORE_GROUPS if old else {}) | names_of(config) for old, (config, _) in zip(older, runs, strict=True)]
    kept = [choices for _, choices in runs if choices is not None]
    if len(kept) == len(runs):
        names = [
            {k: str(v) for k, v in choices.items() if not silent(k) and k not in BY_THEIR_KEYS} for choices in kept
        ]
    else:  # alike for all, so that a name kept here and derived there is no difference
        both = zip(derived, runs, strict=True)
        names = [d | {k: str((choices or {}).get(k, d.get(k, ""))) for k in ALWAYS} for d, (_, choices) in both]
    differing = []
    for key in sorted({key for config in configs for key in config if not silent(key)}):
        # a key that a run of 0.1.0 does not have is new, and had no other value then
        values = {c.get(key, "") for c, old in zip(configs, older, strict=True) if key in c or not old}
        if len(values) > 1 and not _follows(key, configs, names):
            differing.append(key)
    return [n | {key: config.get(key, "") for key in differing} for n, config in zip(names, configs, strict=True)]


def _follows(key: str, configs: list[dict[str, str]], names: list[dict[str, str]]) -> bool:
    """True if all runs with one choice of the key's group have one value of it: the choice says it."""
    group = key.partition(".")[0]
    values: dict[str, set[str]] = {}
    for config, of_run in zip(configs, names, strict=True):
        if group not in of_run:
            return False
        values.setdefault(of_run[group], set()).add(config.get(key, ""))
    return all(len(found) == 1 for found in values.values())
