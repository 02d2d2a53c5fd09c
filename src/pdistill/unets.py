"""diffusers' UNets, without what diffusers imports beside them.

Its packages of networks import every model it has, and peft and transformers with those: a third of the time until the
first update, for classes that no one asked for.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, TypeGuard

import diffusers
from torch import nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNet2DModel

PACKAGES = ("diffusers.models.unets", "diffusers.models.transformers")
CONDITIONAL = "diffusers.models.unets.unet_2d_condition"


def _alone(name: str) -> ModuleType:
    """The module, imported while empty packages stand in for those of `PACKAGES` that nobody has imported yet.

    They are taken away again, so that a later import of a package runs as usual and finds this module in it. A version
    of diffusers that wants more of the packages gets them.
    """
    absent = [package for package in PACKAGES if package not in sys.modules]
    for package in absent:
        spec = importlib.util.find_spec(package)
        if spec is not None:
            sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(name)
    except ImportError:
        pass
    finally:
        for package in absent:
            sys.modules.pop(package, None)
    return importlib.import_module(name)


if not TYPE_CHECKING:
    UNet2DModel = _alone("diffusers.models.unets.unet_2d").UNet2DModel
    diffusers.UNet2DModel = UNet2DModel  # where it would put it itself, after importing the packages


def is_conditional(network: nn.Module) -> "TypeGuard[UNet2DConditionModel]":
    """Whether it is a UNet2DConditionModel, whose class is imported only by who has one."""
    module = sys.modules.get(CONDITIONAL)
    return module is not None and isinstance(network, module.UNet2DConditionModel)
