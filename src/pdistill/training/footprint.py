"""What a network takes, found on the meta device: no weights, no GPU. FLOPs of a pass, memory of an update."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

Evaluation = Callable[[int], object]  # evaluates a network on the meta device, of so many images


def flops(evaluate: Evaluation) -> int:
    """Of the evaluation of one image: two for each multiplication with addition, in products and convolutions alone."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), counter:
        evaluate(1)
    return counter.get_total_flops()


def activations(network: nn.Module, evaluate: Evaluation, mixed: bool = False) -> tuple[int, int]:
    """Bytes of what autograd keeps for the way back: at all, and further ones for each image.

    The float32 weights are left out; with `mixed` copies of them in halves, as autocast keeps, are in the first.
    Attention keeps its inputs and its output alone, as fused kernels do. Passing tensors are not counted.
    """
    one, two = (_kept(network, evaluate, images, mixed) for images in (1, 2))
    return 2 * one - two, two - one


def _kept(network: nn.Module, evaluate: Evaluation, images: int, mixed: bool) -> int:
    weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
    storages: dict[int, Any] = {}  # which stay alive, so that none takes the place of another

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.device("meta"), operations(mixed), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        evaluate(images)
    return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)


class FusedAttention(torch.autograd.Function):
    """Computes nothing, and keeps what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


@contextlib.contextmanager
def operations(mixed: bool) -> Iterator[None]:
    """Attention as fused kernels do it; where `mixed`, the precisions of torch's autocast to bfloat16 on CUDA."""
    names = ("scaled_dot_product_attention", "conv2d", "linear", "group_norm", "layer_norm")
    before = {name: getattr(functional, name) for name in names}

    def cast(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
        def change(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) else value

        return lambda *given, **named: function(*map(change, given), **{k: change(v) for k, v in named.items()})

    functional.scaled_dot_product_attention = lambda query, key, value, **_: FusedAttention.apply(query, key, value)
    if mixed:
        for name in ("conv2d", "linear"):
            setattr(functional, name, cast(before[name], torch.bfloat16))
        for name in ("group_norm", "layer_norm"):
            setattr(functional, name, cast(before[name], torch.float32))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(functional, name, function)
