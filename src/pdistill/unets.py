"""diffusers' UNets, without what diffusers imports beside them."""

import sys
from typing import TYPE_CHECKING, TypeGuard

import diffusers
from torch import nn

from pdistill.lazy import lazily

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

CONDITIONAL = "diffusers.models.unets.unet_2d_condition"

# The first two import every network that diffusers has, and peft and transformers with those; the third transformers.
lazily("diffusers.models.unets", {"UNet2DModel": "unet_2d"})
lazily("diffusers.models.transformers", {})
lazily("diffusers.quantizers", {"DiffusersAutoQuantizer": "auto", "DiffusersQuantizer": "base"})

UNet2DModel = diffusers.UNet2DModel


def is_conditional(network: nn.Module) -> "TypeGuard[UNet2DConditionModel]":
    """Whether it is a UNet2DConditionModel, whose class is imported only by who has one."""
    module = sys.modules.get(CONDITIONAL)
    return module is not None and isinstance(network, module.UNet2DConditionModel)
