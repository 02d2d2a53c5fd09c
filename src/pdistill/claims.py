"""What a configuration in a file claims of a network, held against the weights beside it before memory is taken.

A line of JSON can ask for a network of 10^12 numbers, or for 10^9 layers. Networks are therefore built on the meta
device first, where tensors have shapes alone.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdistill.reading import MOST_PIXELS, check_tensors, regular

MOST_LAYERS = 2000  # of all blocks; Stable Diffusion XL has 60
LISTED = 64  # blocks, at most
LAYERS = (  # keys of diffusers and transformers that count layers: in all, or of each block
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
    "layers",
)


def check_layers(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a configuration of more blocks and layers than a network has."""
    layers = 1
    for key, value in config.items():
        if isinstance(value, list) and key.startswith("block") and len(value) > LISTED:
            raise ValueError(f"{key} lists {len(value)} blocks, more than {LISTED}")
        if key in LAYERS and value is not None:
            layers *= max(1, _most(value))
    if layers * _length(config.get("block_out_channels")) > MOST_LAYERS:
        raise ValueError(f"its configuration claims more than {MOST_LAYERS} layers")


def _most(value: Any) -> int:
    """The largest number in nested lists."""
    return max(map(_most, value), default=0) if isinstance(value, list | tuple) else int(value)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) else 1


def check_shape(shape: tuple[int, ...]) -> None:
    """Raises ValueError for images (C, H, W) that nobody could hold."""
    if len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
        raise ValueError(f"images of shape {shape} are none")
    if shape[0] * shape[1] * shape[2] > 3 * MOST_PIXELS:
        raise ValueError(f"images of shape {shape} have more than {3 * MOST_PIXELS:,} numbers")


def fitted(build: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """`build()` with these weights, none more and none less. Raises ValueError where their shapes are others."""
    claimed = {name: value.shape for name, value in _on_meta(build).state_dict().items()}
    for name in sorted(claimed.keys() | weights.keys()):
        if name not in claimed or name not in weights or claimed[name] != weights[name].shape:
            here = tuple(claimed[name]) if name in claimed else "none"
            there = tuple(weights[name].shape) if name in weights else "none"
            raise ValueError(f"its configuration wants {name} of shape {here}, and its weights have {there}")
    network = build()
    network.load_state_dict(weights)
    return network


def check_bytes(build: Callable[[], nn.Module], files: Iterable[Path]) -> None:
    """Raises ValueError where `build()` has more parameters than the files of its weights have bytes."""
    size = 0
    for file in files:
        size += regular(file)
        if file.suffix == ".safetensors":
            check_tensors(file)
    parameters = sum(value.numel() for value in _on_meta(build).state_dict().values())
    if parameters > size:
        raise ValueError(f"its configuration claims {parameters:,} parameters, and its files have {size:,} bytes")


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()
