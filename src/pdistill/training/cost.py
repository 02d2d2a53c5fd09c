"""What a stage takes: seconds, network passes and joules."""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from pdistill import processes
from pdistill.denoiser import Denoiser


class PassCount:
    """Counts the images that the networks of a module's denoisers see: once each, thrice with gradients.

    Going back costs about twice what going forth does.
    """

    def __init__(self, module: Any) -> None:
        self.images, self.on = 0, True
        self.trained = module.denoiser.network
        self.denoisers = [part for part in module.modules() if isinstance(part, Denoiser)]
        for denoiser in self.denoisers:  # no hooks of networks, which would be compiled with them
            denoiser.on_pass = self._count

    def _count(self, network: nn.Module, images: int) -> None:
        if self.on:
            self.images += images * (3 if network is self.trained and torch.is_grad_enabled() else 1)

    def close(self) -> None:
        """Counts no more."""
        for denoiser in self.denoisers:
            denoiser.on_pass = None


class Cost(Callback):
    """What a stage takes, restarts included: seconds, network passes and, where NVIDIA's library tells, joules.

    A network pass is the evaluation of one batch of `batch_size` images, whatever parts it was taken in; an update's
    with gradients is three. What is drawn or measured between updates is not counted.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.spent: dict[str, float | None] = {"training_seconds": 0.0, "joules": 0.0, "network_passes": 0.0}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the clock and the meter."""
        self.device, self.before = pl_module.device, self.spent
        self.clock, self.meter = time.perf_counter(), joules(pl_module.device)
        self.passes = PassCount(pl_module)
        self.passes.on = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the passes of a training step."""
        self.passes.on = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts no others."""
        self.passes.on = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves nothing on denoisers that somebody may go on with, and copy."""
        if hasattr(self, "passes"):
            self.passes.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds up."""
        self.spent = self.state_dict()
        self.passes.close()

    def state_dict(self) -> dict[str, float | None]:
        """What was spent until now, by all processes, which must call this at once."""
        meter = joules(self.device)
        mine = None if meter is None or self.meter is None else meter - self.meter
        measured, images = zip(*processes.gather((mine, self.passes.images)), strict=True)
        return {
            "training_seconds": (self.before["training_seconds"] or 0) + time.perf_counter() - self.clock,
            "joules": _sum(self.before["joules"], *measured),
            "network_passes": _sum(self.before["network_passes"], sum(images) / self.batch_size),
        }

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """What was spent before; checkpoints of 0.2.0 do not know their passes."""
        self.spent = {"network_passes": None} | state_dict


def _sum(*values: float | None) -> float | None:
    """None where a part is not known."""
    return None if None in values else sum(filter(None, values))


def joules(device: torch.device) -> float | None:
    """What a GPU has used since its driver was loaded; None for other devices, and where NVIDIA's library is absent."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # a library, a driver or a device that does not tell
        return None
