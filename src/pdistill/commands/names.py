"""What a run is called: its name is made of what was typed, so that the same command finds the same directory."""

import hashlib
import os
import re

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from pdistill.commands.identity import is_imported
from pdistill.report.choices import NO_DIFFERENCE

# Groups that say what is computed; the others say where, or who watches.
NAMED_GROUPS = (
    "dataset",
    "network",
    "schedule",
    "parameterization",
    "weighting",
    "optimizer",
    "method",
    "steps",
    "metrics",
)
ALWAYS_NAMED = ("dataset", "parameterization", "weighting", "schedule", "steps")
# Keys that change nothing in the result: no name says them, and they may differ when a run is resumed.
UNCOMPARED = (*NO_DIFFERENCE, "trainer", "callbacks")
LONGEST_NAME = 120  # W&B takes 128 characters
SWEPT = "PDISTILL_SWEPT"  # of a sweep's jobs, in whatever process: the keys that differ between them


def run_name() -> str:
    """The default of `name`: the experiment, or the main groups, and every override that was typed.

    No time stamp: the same command has the same name, and so resumes. Nothing in it needs quotes in an override.
    """
    hydra = HydraConfig.get()
    choices, typed = hydra.runtime.choices, typed_overrides(hydra.overrides.task)
    if choices.get("experiment"):
        parts = [choices["experiment"].replace("/", "_")] + [choices[g] for g in NAMED_GROUPS if g in typed]
    else:
        parts = [choices[g] for g in ALWAYS_NAMED]
        parts += [choices[g] for g in NAMED_GROUPS if g in typed and g not in ALWAYS_NAMED]
    if hydra.job.config_name == "train":
        parts.append("teacher")
    if is_imported(typed.get("teacher")):  # which brings its own
        own = {"schedule"} if "parameterization" in typed else {"schedule", "parameterization"}
        parts = [part for part in parts if part not in {choices[g] for g in own}]
    return shortened([*parts, *_keys_in_words(typed)])


def sweep_name(prefix: str, overrides: list[str]) -> str:
    """The name of a sweep's job: the prefix that was given, and what the sweep varies."""
    swept = os.environ.get(SWEPT, "").split()
    typed = {k: v for k, v in typed_overrides(overrides).items() if k in swept}
    groups = [v for k, v in typed.items() if k in NAMED_GROUPS or k == "experiment"]
    others = [f"{k}-{v}" for k, v in sorted(typed.items()) if k not in (*NAMED_GROUPS, "experiment")]
    return shortened([prefix, *groups, *others])


def typed_overrides(overrides: list[str]) -> dict[str, str]:
    """The overrides "key=value" of a command line, without their signs."""
    return dict(o.lstrip("+~").split("=", 1) for o in overrides if "=" in o)


def _keys_in_words(typed: dict[str, str]) -> list[str]:
    silent = (*NAMED_GROUPS, *UNCOMPARED, "experiment")
    return [
        f"{k}-{v}"
        for k, v in sorted(typed.items())
        if k.split(".")[0] not in silent or ("." in k and k.split(".")[0] in NAMED_GROUPS)
    ]


def shortened(parts: list[str]) -> str:
    """One directory name, at most 120 characters long: a long one ends in a hash of the whole."""
    name = re.sub(r"[^\w.+-]+", "_", re.sub(r"[\[\]{}'\"]", "", "-".join(parts))).strip("_")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
