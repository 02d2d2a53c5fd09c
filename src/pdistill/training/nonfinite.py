"""Updates whose gradient is not finite: left out as the authors' code does, and counted without waiting for the device.

Weights, optimizer state and EMAs stay as they are; the update is counted, so that the learning rate, the images and the
noise move on. Gradients are those of all processes and accumulated batches, so that every process decides alike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pdistill.errors import UserError


def leave_out(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Makes the optimizer's next step change nothing where `bad`, a bool on the device, holds.

    Torch's fused optimizers look at `found_inf` on the device. Others leave alone what has no gradient, and to know the
    host waits for the device.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    elif bad:
        optimizer.zero_grad()


def average(ema: Sequence[Tensor], weights: Sequence[Tensor], decay: float, bad: Tensor | None) -> None:
    """ema <- decay ema + (1 - decay) weights; with `bad` the ema stays."""
    if bad is not None and bad.device.type != "cpu":
        lerp(ema, weights, decay, bad)
    elif not bad:
        get_ema_multi_avg_fn(decay)(tuple(ema), tuple(weights), None)


@torch.no_grad()
def lerp(ema: Sequence[Tensor], weights: Sequence[Tensor], decay: float, bad: Tensor) -> None:
    """`average` for devices that the host does not wait for."""
    share = torch.where(bad, 0.0, 1 - decay)
    torch._foreach_lerp_(tuple(ema), tuple(weights), [share.to(e.dtype) for e in ema])


class Skips:
    """The count of updates that were left out: in all, in a row, and the longest row; kept in checkpoints."""

    def __init__(self, prefix: str, most_in_a_row: int) -> None:
        self.prefix = prefix
        self.most_in_a_row = most_in_a_row
        self.counts = torch.zeros(4, dtype=torch.long)  # in all, in a row, the longest row, the last one's update

    def add(self, bad: Tensor, update: int) -> None:
        """After every update, on the device alone."""
        total, row, longest, last = self.counts.to(bad.device).unbind()
        row = (row + 1) * bad
        last = torch.where(bad, update, last)
        self.counts = torch.stack([total + bad, row, torch.maximum(longest, row), last])

    @property
    def total(self) -> int:
        """Updates that were left out; asking waits for the device."""
        return int(self.counts[0])

    def refuse_a_long_row(self) -> None:
        """Raises UserError where too many in a row were left out; waits for the device."""
        _, _, longest, last = self.counts.tolist()
        if longest >= self.most_in_a_row:
            raise UserError(
                f"{self.prefix}: {longest} updates in a row, the last at update {last}, had gradients that are not "
                f"finite and were left out: nothing is learned any more. Lower the learning rate or gradient_clip, use "
                f"another parameterization, weighting or precision, or allow more with skip_nonfinite_in_a_row="
                f"{2 * longest}; checkpoints from before are kept"
            )

    def told(self) -> str:
        """A line for the user; "" if none was left out."""
        total, _, longest, last = self.counts.tolist()
        if not total:
            return ""
        return (
            f"{self.prefix}: {total} updates were left out, their gradients not finite (at most {longest} in a row, "
            f"the last at update {last})"
        )
