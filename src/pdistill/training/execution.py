"""How the networks of a stage are run while it trains: compiled or not, in which layout and precision.

None of it is a part of a denoiser: the parameters and their names stay what they are, so that checkpoints, averages and
directories do not know of it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pdistill.denoiser import Denoiser
from pdistill.errors import UserError, first_line
from pdistill.training.settings import Execution

GRAPHS = ("reduce-overhead", "max-autotune")  # compile modes that make CUDA graphs, whose outputs are overwritten


class LastConvolution(nn.Conv2d):
    """In float32, whatever autocast says: halves would round x_hat itself, and SNR weights multiply that error."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def check(execution: Execution, network: nn.Module) -> None:
    """Raises UserError where this network, or this machine, cannot be run so."""
    if execution.gradient_checkpointing and not getattr(network, "_supports_gradient_checkpointing", False):
        raise UserError(
            f"gradient_checkpointing=true needs a network of diffusers that knows how, and a {type(network).__name__} "
            f"does not: leave it out, or take smaller parts with max_batch_per_device"
        )
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if execution.compile and not any(shutil.which(name.split()[0]) for name in compilers if name):
        raise UserError("compile=true needs a C++ compiler, and there is none: install g++, or name one in $CXX")


def arrange(denoiser: Denoiser, execution: Execution) -> Denoiser:
    """The denoiser with its weights in the layout of `channels_last`, in place."""
    if execution.channels_last:
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return denoiser


def align(optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer's state the layout of its parameters, which a resumed run may have changed.

    Fused kernels walk through both as they lie in memory.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@contextlib.contextmanager
def running(module: Any, mixed: bool) -> Iterator[None]:
    """While a `DenoisingModule` is fitted: its networks are run as its recipe's `execution` says, `mixed` in halves.

    Whatever is changed is changed back. Raises UserError for a network that cannot be compiled.
    """
    execution: Execution = module.recipe.execution
    averages = {id(part) for ema in module.emas for part in ema.modules()}
    denoisers = [part for part in module.modules() if isinstance(part, Denoiser) and id(part) not in averages]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_float32(None if execution.matmul_precision == "default" else execution.matmul_precision))
        for denoiser in denoisers if mixed else ():
            stack.enter_context(exact_end(denoiser.network))
        if execution.gradient_checkpointing:
            module.denoiser.network.enable_gradient_checkpointing()
            stack.callback(module.denoiser.network.disable_gradient_checkpointing)
        if execution.compile:
            stack.enter_context(_compiled(denoisers, execution.compile_mode))
        yield


@contextlib.contextmanager
def paused(execution: Execution) -> Iterator[None]:
    """For samples between two updates: as all samples are drawn, not compiled, since their batches have other sizes."""
    eager = torch.compiler.set_stance("force_eager") if execution.compile else contextlib.nullcontext()
    with eager, _float32(None if execution.matmul_precision == "default" else "default"):
        yield


@contextlib.contextmanager
def _float32(precision: str | None) -> Iterator[None]:
    """How float32 products are computed; "default" is torch's own way; with None nothing changes."""
    if precision is None:
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "default" else precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def exact_end(network: Any) -> Iterator[None]:
    """Makes the last convolution of a diffusers UNet a `LastConvolution`; of another network nothing is known."""
    last: Any = getattr(network, "conv_out", None)
    if type(last) is nn.Conv2d:
        last.__class__ = LastConvolution
    try:
        yield
    finally:
        if type(last) is LastConvolution:
            setattr(last, "__class__", nn.Conv2d)  # noqa: B010  # which types forbid


@contextlib.contextmanager
def _compiled(denoisers: list[Denoiser], mode: str) -> Iterator[None]:
    """In place, so that no name changes; dropout draws the numbers that it draws without."""
    import torch._inductor.config as inductor  # these take a second, and most runs do without
    from torch._dynamo.exc import TorchDynamoException

    torch.compiler.reset()  # what the stage before compiled would count against torch's limit
    hooks = []
    with inductor.patch(fallback_random=True):
        for denoiser in denoisers:
            compile_network(denoiser.network, mode)
            if mode in GRAPHS:
                hooks.append(denoiser.register_forward_hook(lambda part, given, x_hat: x_hat.clone()))
        try:
            yield
        except TorchDynamoException as error:
            raise UserError(
                f"compile=true: this network cannot be compiled ({first_line(error)}): leave compile=true out"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
            for denoiser in denoisers:
                denoiser.network._compiled_call_impl = None
            torch.compiler.reset()


def compile_network(network: nn.Module, mode: str) -> None:
    """Compiles a network at its next call, for each size of batch anew: in training there is one."""
    network.compile(mode=None if mode == "default" else mode, dynamic=False)
