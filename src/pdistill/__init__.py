"""Progressive distillation of diffusion models (Salimans & Ho, 2022) on Lightning and Hydra.

The public names are imported when they are first asked for: `import pdistill` alone brings in no torch.
"""

import importlib
from typing import TYPE_CHECKING

from pdistill.registry import register

if TYPE_CHECKING:
    from pdistill.dataset import ImageSet, digits
    from pdistill.denoiser import Denoiser
    from pdistill.interop.flax import load_official_checkpoint
    from pdistill.interop.teachers import load_diffusers_teacher
    from pdistill.metrics.classifier import train_classifier
    from pdistill.metrics.fid import FID
    from pdistill.network import unet
    from pdistill.parameterization import Edm, Eps, Flow, V, X, XEps
    from pdistill.report.grids import save_grid
    from pdistill.sampling import ddim_step, sample
    from pdistill.schedule import CosineSchedule, EdmSchedule, FlowSchedule
    from pdistill.steps import stages
    from pdistill.target import distillation_target
    from pdistill.training.distillation import DistillationModule
    from pdistill.training.fit import FitSettings, fit
    from pdistill.training.module import Recipe
    from pdistill.training.settings import Distillation, Training
    from pdistill.training.teacher import TeacherModule
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
    "unet": "network",
    "sample": "sampling",
    "ddim_step": "sampling",
    "distillation_target": "target",
    "load_diffusers_teacher": "interop.teachers",
    "load_official_checkpoint": "interop.flax",
    "ImageSet": "dataset",
    "digits": "dataset",
    "stages": "steps",
    "FID": "metrics.fid",
    "train_classifier": "metrics.classifier",
    "TeacherModule": "training.teacher",
    "DistillationModule": "training.distillation",
    "Recipe": "training.module",
    "Training": "training.settings",
    "Distillation": "training.settings",
    "FitSettings": "training.fit",
    "fit": "training.fit",
    "save_grid": "report.grids",
}

__all__ = [
    "FID",
    "CosineSchedule",
    "Denoiser",
    "Distillation",
    "DistillationModule",
    "Edm",
    "EdmSchedule",
    "Eps",
    "FitSettings",
    "Flow",
    "FlowSchedule",
    "ImageSet",
    "Recipe",
    "TeacherModule",
    "Training",
    "V",
    "X",
    "XEps",
    "constant",
    "ddim_step",
    "digits",
    "distillation_target",
    "fit",
    "load_diffusers_teacher",
    "load_official_checkpoint",
    "register",
    "sample",
    "save_grid",
    "snr",
    "snr_plus_one",
    "stages",
    "train_classifier",
    "truncated_snr",
    "unet",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pdistill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pdistill.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
