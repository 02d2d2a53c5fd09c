"""Progressive distillation of diffusion models (Salimans & Ho, 2022) on Lightning and Hydra.

The public names are imported when they are first asked for: `import pdistill` alone brings in no torch.
"""

import importlib
from typing import TYPE_CHECKING

from pdistill.registry import register

if TYPE_CHECKING:
    from pdistill.denoiser import Denoiser
    from pdistill.interop.flax import load_official_checkpoint
    from pdistill.interop.teachers import load_diffusers_teacher
    from pdistill.parameterization import Edm, Eps, Flow, V, X, XEps
    from pdistill.sampling import ddim_step, sample
    from pdistill.schedule import CosineSchedule, EdmSchedule, FlowSchedule
    from pdistill.target import distillation_target
    from pdistill.weighting import constant, snr, snr_plus_one, truncated_snr

__version__ = "0.2.0"

_HOMES = {
    "CosineSchedule": "schedule",
    "FlowSchedule": "schedule",
    "EdmSchedule": "schedule",
    "Eps": "parameterization",
    "X": "parameterization",
    "XEps": "parameterization",
    "V": "parameterization",
    "Flow": "parameterization",
    "Edm": "parameterization",
    "snr": "weighting",
    "truncated_snr": "weighting",
    "snr_plus_one": "weighting",
    "constant": "weighting",
    "Denoiser": "denoiser",
    "sample": "sampling",
    "ddim_step": "sampling",
    "distillation_target": "target",
    "load_diffusers_teacher": "interop.teachers",
    "load_official_checkpoint": "interop.flax",
}

__all__ = [
    "CosineSchedule",
    "Denoiser",
    "Edm",
    "EdmSchedule",
    "Eps",
    "Flow",
    "FlowSchedule",
    "V",
    "X",
    "XEps",
    "constant",
    "ddim_step",
    "distillation_target",
    "load_diffusers_teacher",
    "load_official_checkpoint",
    "register",
    "sample",
    "snr",
    "snr_plus_one",
    "truncated_snr",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pdistill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pdistill.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
