"""Parts by their names: built-in ones, and those that a program outside of this one adds with `register`.

A directory on disk and an override on the command line name a part; neither can name code to import. Built-in parts
are listed by where they are and imported when first asked for.
"""

import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any

from pdistill.errors import UserError, first_line

BUILT_IN: dict[str, dict[str, Any]] = {
    "parameterization": {
        name: f"pdistill.parameterization:{cls}"
        for name, cls in {"eps": "Eps", "x": "X", "x_eps": "XEps", "v": "V", "flow": "Flow", "edm": "Edm"}.items()
    }
    | {"heads": "pdistill.heads:Heads"},
    "schedule": {
        name: f"pdistill.schedule:{cls}"
        for name, cls in {
            "cosine": "CosineSchedule",
            "flow": "FlowSchedule",
            "edm": "EdmSchedule",
            "betas": "BetaSchedule",
            "discrete_betas": "DiscreteBetaSchedule",
        }.items()
    },
    "weighting": {
        name: f"pdistill.weighting:{name}"
        for name in ("snr", "truncated_snr", "snr_plus_one", "min_snr_plus_one", "constant", "flow", "edm")
    },
    "network": {"unet": "pdistill.network:unet"},
    "dataset": {
        name: f"pdistill.dataset:{name}" for name in ("digits", "cifar10", "image_folder", "imagenet64", "lsun")
    }
    | {"huggingface": "pdistill.dataset.huggingface:load", "none": "pdistill.dataset.samples:teacher_samples"},
    "metrics": {
        "classifier": "pdistill.metrics.classifier:train_classifier",
        "inception": "pdistill.metrics.extractors:inception",
        "auto": "pdistill.metrics.rotations:fitting",
    },
    "sampler": {name: f"pdistill.sampling:{name}" for name in ("ddim", "ancestral", "stochastic")}
    | {
        name: f"pdistill.interop.schedulers:{function}"
        for name, function in {
            "dpmsolver++2m": "dpmsolver_2m",
            "dpmsolver++3m": "dpmsolver_3m",
            "unipc": "unipc",
            "deis": "deis",
            "heun": "heun",
        }.items()
    },
    "callbacks": {},
    "optimizer": {"adamw": "pdistill.optimizer:adamw"},
    "method": {
        "halving": "pdistill.method.halving:Halving",
        "tract": "pdistill.method.tract:Tract",
        "multistep_consistency": "pdistill.method.multistep_consistency:MultistepConsistency",
        "parallel_decoding": "pdistill.method.parallel_decoding:ParallelDecoding",
    },
}
ALIASES = {"extractor": "metrics", "extractors": "metrics", "callback": "callbacks", "samplers": "sampler"}
_parts: dict[str, dict[str, Any]] = {group: dict(parts) for group, parts in BUILT_IN.items()}


def register(group: str, name: str, part: Any) -> None:
    """Makes `part` known as `name` in a Hydra group (or "sampler"), to directories on disk and to overrides.

    What a part must be is in docs/extending.md, group by group. Registering the same part again changes nothing.
    Raises UserError for a group that does not exist and for a name that another part has.
    """
    group = _group(group)
    known = _parts[group].get(name)
    if known is not None and _place(known) != _place(part):
        raise UserError(f"{group} {name!r} is registered already, as {_place(known)}: give {_place(part)} another name")
    _parts[group][name] = part


def find(group: str, name: str) -> Any:
    """The part of that name. Raises UserError where there is none, with how to register one."""
    parts = _parts[_group(group)]
    if name not in parts:
        raise UserError(
            f"{group} {name!r} is neither built in ({', '.join(parts) or 'none is'}) nor registered: call "
            f'pdistill.register("{_group(group)}", "{name}", ...) before, or on the command line '
            f"imports=[<the module that does>]"
        )
    if isinstance(parts[name], str):
        module, _, attribute = parts[name].partition(":")
        parts[name] = getattr(importlib.import_module(module), attribute)
    return parts[name]


def names(group: str) -> list[str]:
    """The names known in a group, built-in ones first."""
    return list(_parts[_group(group)])


def name_of(group: str, part: Any) -> str | None:
    """The name under which `part` is known; None where it is not."""
    return next((name for name, known in _parts[_group(group)].items() if _place(known) == _place(part)), None)


def _group(group: str) -> str:
    group = ALIASES.get(group, group)
    if group not in _parts:
        raise UserError(f"there is no group {group!r} to register in: choose among {', '.join(_parts)}")
    return group


def _place(part: Any) -> str:
    """Where a part is defined, "module:name", as the built-in ones are listed."""
    if isinstance(part, str):
        return part
    return f"{getattr(part, '__module__', '')}:{getattr(part, '__qualname__', repr(part))}"


def state_of(part: Any) -> dict[str, Any]:
    """The arguments that make a parameterization or schedule again: its `state()`, or `arguments_of` it."""
    return dict(part.state()) if callable(getattr(part, "state", None)) else arguments_of(part)


def arguments_of(part: Any) -> dict[str, Any]:
    """The fields of a dataclass, the attributes of another object."""
    if dataclasses.is_dataclass(part):
        return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return dict(vars(part))


def import_parts(modules: Iterable[str]) -> None:
    """Imports modules that register parts of their own. Raises UserError, in one line, where one cannot be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except UserError:
            raise
        except Exception as error:  # whatever the user's module raises
            missing = isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name))
            hint = "install it, or put its folder into PYTHONPATH" if missing else "fix that module"
            raise UserError(
                f"imports=[{module}]: {module} cannot be imported ({type(error).__name__}: {first_line(error)}): {hint}"
            ) from error
