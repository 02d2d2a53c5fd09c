"""Low-rank adapters (LoRA, Hu et al., 2021, 2106.09685) beside the attention's projections: W x + B A x.

A student of adapters has the teacher's weights, frozen, and trains A (rank, in) and B (out, rank) alone, with what the
guidance goes through. On disk its weights are merged, W + B A, with the adapters in a file beside them; the next stage
takes them apart again and goes on with the same adapters, so that those of the last student lead from the weights that
the first student started from to its own. Needs the package `peft`.
"""

import copy
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.randomness import seed_of

FILE = "pytorch_lora_weights.safetensors"  # as diffusers' `pipe.load_lora_weights(directory)` looks for it
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TRAINED_WHOLE = ("cond_proj", "guidance")  # parts of the names of what takes the guidance
A, B = "lora_A", "lora_B"


def check(rank: int, network: nn.Module) -> None:
    """Raises UserError where `peft` is missing, or the network has no attention for adapters to stand beside."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"lora.rank={rank} needs the package peft: pip install 'pdistill[text]'")
    if not any(name.endswith(TARGETS) for name, _ in network.named_modules()):
        raise UserError(
            f"lora.rank={rank} trains the attention's projections alone, and this {type(network).__name__} has none: "
            f"leave it out"
        )


def add(denoiser: Denoiser, rank: int) -> None:
    """Puts adapters beside the projections of a student, in place; at first they change nothing.

    Where the denoiser has adapters in its weights already, these are taken out and trained on. Raises UserError where
    their rank is another.
    """
    check(rank, denoiser.network)
    import peft

    kept = denoiser.adapters
    if kept and (theirs := min(next(iter(kept.values())).shape)) != rank:
        raise UserError(f"lora.rank={rank}, and what the student starts from has adapters of rank {theirs}: give that")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("adapters", rank))
        peft.inject_adapter_in_model(config, denoiser.network)
    if kept:
        for name, layer in _layers(denoiser.network).items():
            a, b = (kept[f"{name}.{part}.weight"] for part in (A, B))
            with torch.no_grad():
                for weight, value in zip(_pair(layer), (a, b), strict=True):
                    weight.copy_(value)
                layer.get_base_layer().weight.sub_((b @ a).to(layer.get_base_layer().weight))
    denoiser.adapters = None


def freeze_the_others(denoiser: Denoiser) -> Denoiser:
    """Of a student with adapters, all but them and what the guidance goes through; of another, nothing."""
    denoiser.requires_grad_(True)
    if _layers(denoiser.network):
        for name, parameter in denoiser.network.named_parameters():
            parameter.requires_grad_(any(part in name for part in (A, B, *TRAINED_WHOLE)))
    return denoiser


def merged(denoiser: Denoiser) -> Denoiser:
    """A copy whose weights are W + B A, and that remembers A and B as `adapters`; itself, where it has none."""
    if not _layers(denoiser.network):
        return denoiser
    whole = copy.deepcopy(denoiser)
    whole.adapters = {}
    for name, layer in _layers(whole.network).items():
        a, b = (weight.detach() for weight in _pair(layer))
        linear = layer.get_base_layer()
        linear.weight.data += b @ a
        whole.adapters |= {f"{name}.{A}.weight": a.cpu(), f"{name}.{B}.weight": b.cpu()}
        parent, _, child = name.rpartition(".")
        whole.network.get_submodule(parent)._modules[child] = linear
    vars(whole.network).pop("peft_config", None)
    return whole


def for_diffusers(adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `FILE`."""
    return {f"unet.{name}": value.contiguous() for name, value in adapters.items()}


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters that `FILE` holds."""
    return {name.removeprefix("unet."): value for name, value in tensors.items()}


def _layers(network: nn.Module) -> dict[str, Any]:
    """peft's layers, each a linear one with its adapters, by name."""
    return {name: module for name, module in network.named_modules() if hasattr(module, A)}


def _pair(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight
