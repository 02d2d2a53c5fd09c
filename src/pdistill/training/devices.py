"""Strategies of several devices: each with a copy of the networks (`ddp`), or each with a share of them (`fsdp2`).

Importing this module tells Lightning's Trainer of both, by these names.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pdistill.denoiser import Denoiser

SHARDED = "fsdp2"
SMALLEST_SHARE = 0.01  # of a network's weights; smaller blocks are gathered with what is around them


class Replicated(DDPStrategy):
    """DDP in whose buckets there is what is trained, and nothing else: no teacher, EMA or buffer is sent at any step.

    Gradients are views of the buckets, which saves a copy of them, and no search for unused parameters is done. What is
    not trained is made equal once, when a stage begins; what a network's buffers then become is the rank's own affair.
    """

    def __init__(self, **options: Any) -> None:
        ours: dict[str, Any] = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        super().__init__(**ours | options)

    def configure_ddp(self) -> None:
        """Sends what is not trained once, and leaves it out of DDP."""
        module = self.lightning_module
        assert module is not None
        named = [*module.named_parameters(), *module.named_buffers()]
        still = {name: tensor.detach() for name, tensor in named if not tensor.requires_grad}
        for tensor in still.values():
            torch.distributed.broadcast(tensor, src=0)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(still))
        super().configure_ddp()


class Sharded(DDPStrategy):
    """FSDP2: every device holds an equal share of each weight, of its gradient, its EMAs and the optimizer's state.

    The blocks of a network are put together when they are evaluated and taken apart again, the frozen teacher's too.
    Networks are taken apart on the CPU's side, block by block, so that no device ever holds a whole one. Checkpoints
    hold whole tensors, as those of one device do: any number of devices goes on from them, under either strategy.
    """

    def model_to_device(self) -> None:
        """Takes every network apart; only then there is room for what is left."""
        module: Any = self.lightning_module
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        self.empty = {part: _without_weights(part) for part in module.modules() if isinstance(part, Denoiser)}
        for denoiser in self.empty:
            shard(denoiser.network, mesh)
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Nothing: gradients are joined by the networks' own hooks."""

    def whole(self, denoiser: Denoiser) -> Denoiser:
        """A copy with whole weights, on the device. Every process must call it."""
        found = copy.deepcopy(self.empty[denoiser])
        state = denoiser.state_dict()
        found.load_state_dict(
            {k: _whole(v) if isinstance(v, DTensor) else v.clone() for k, v in state.items()}, assign=True
        )
        return found.requires_grad_(False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors, on the main process; all must call it. A frozen teacher is not gathered."""
        module: Any = self.lightning_module
        kept = {k: v for k, v in module.state_dict().items() if not k.startswith(module.left_out)}
        return self._for_main(kept)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole tensors, on the main process; all must call it."""
        state: dict[str, Any] = dict(super().optimizer_state(optimizer))
        kept = {k: self._for_main(v) for k, v in state["state"].items()}
        return state | {"state": kept}

    def _for_main(self, named: Mapping[Any, Any]) -> dict[Any, Any]:
        """Tensors whole and on the CPU, one after the other; empty for other processes."""
        found = {}
        for name, value in named.items():
            value = _whole(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                found[name] = value.cpu() if isinstance(value, Tensor) else value
        return found

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives each process its share of what the checkpoint holds whole."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {i: _shares(parameters[i], kept) for i, kept in state["state"].items()}
            optimizer.load_state_dict(state | {"state": shares})

    def teardown(self) -> None:
        """As of DDP, but the shares stay where they are: `whole` is asked for what they became."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def whole(trainer: Trainer, denoiser: Denoiser) -> Denoiser:
    """A denoiser of the module in training as one that can be sampled, measured and saved; every process calls it."""
    strategy = trainer.strategy
    return strategy.whole(denoiser) if isinstance(strategy, Sharded) else denoiser


def shard(network: nn.Module, mesh: Any) -> None:
    """Takes a network apart: the larger members of its lists of blocks, inner ones first, then what is left."""
    total = sum(p.numel() for p in network.parameters())
    taken: set[nn.Parameter] = set()
    for block in reversed(list(_blocks(network))):
        mine = set(block.parameters()) - taken
        if sum(p.numel() for p in mine) >= SMALLEST_SHARE * total:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
            taken |= set(block.parameters())
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


def _without_weights(denoiser: Denoiser) -> Denoiser:
    """A copy whose parameters take no memory."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in denoiser.parameters()}
    return copy.deepcopy(denoiser, memo)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shares(parameter: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """Of an optimizer's state of one parameter: what has its shape is taken apart as it was."""
    if not isinstance(parameter, DTensor):
        return dict(state)
    mesh, placements = parameter.device_mesh, parameter.placements

    def share(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)

    return {name: share(value) for name, value in state.items()}


def register(strategies: Iterable[tuple[str, type[DDPStrategy], str]]) -> None:
    """Tells Lightning's Trainer of strategies: (name, class, in words)."""
    for name, strategy, words in strategies:
        StrategyRegistry.register(name, strategy, description=words, override=True)


register(
    (
        ("ddp", Replicated, "each device has a copy of the networks"),
        (SHARDED, Sharded, "each device has a share of the networks"),
    )
)
