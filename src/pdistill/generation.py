"""Images drawn in batches by any sampler, each from noise that depends on (seed, i) alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdistill.bars import bar
from pdistill.display import SAMPLING
from pdistill.errors import UserError
from pdistill.randomness import sample_noise
from pdistill.sampling import Callback, Condition, Variance, sample, sampler_of


@dataclass(frozen=True)
class Draw:
    """How images are drawn by `generate`: the noise of image i depends on (seed, i) alone."""

    num_steps: int
    seed: int = 0
    batch_size: int = 250
    sampler: str | None = None
    """By default the denoiser's own."""
    clip: bool = True
    guidance: float | None = None
    """None: the denoiser's own, `Denoiser.default_guidance`."""
    variance: Variance = "large"
    labels: Sequence[int] | None = None
    """Image i is of class labels[i % len(labels)]; by default all classes take turns, so that they are balanced."""
    prompts: Sequence[str] | None = None
    """The same of a denoiser that is conditioned on text; by default those that it was distilled with."""

    def options(self) -> dict[str, Any]:
        """What `sample` takes beside the noise and the condition."""
        keys = ("num_steps", "sampler", "clip", "guidance", "variance")
        return {key: getattr(self, key) for key in keys}


def generate(denoiser: Any, indices: Sequence[int], draw: Draw, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Batches of samples (B, C, H, W) in [-1, 1], image i from noise that depends on (seed, i) alone; latents decoded.

    A bar counts the steps. Raises UserError for samples that are not finite.
    """
    starts = range(0, len(indices), draw.batch_size)
    total = len(starts) * draw.num_steps
    with bar((), f"sampling in {draw.num_steps} steps", total, "step", within=True, phase=SAMPLING) as progress:
        for k, start in enumerate(starts):
            batch = indices[start : start + draw.batch_size]
            images = drawn(denoiser, batch, draw, device, lambda i, z, x_hat: progress.update())
            progress.update((k + 1) * draw.num_steps - progress.done)  # of samplers that call nobody back
            yield images


def drawn(
    denoiser: Any,
    batch: Sequence[int],
    draw: Draw,
    device: torch.device | str = "cpu",
    callback: Callback | None = None,
    unit_noise: Tensor | None = None,
) -> Tensor:
    """One batch of `generate`, on `device`; `callback(i, z, x_hat)` sees every step.

    `unit_noise` (B, C, H, W) takes the place of the initial noise that depends on (seed, i).
    """
    codec = getattr(denoiser, "codec", None)

    def noise(**key: int) -> Tensor:
        return sample_noise(draw.seed, batch, denoiser.image_shape, **key).to(device)

    initial = noise() if unit_noise is None else unit_noise.to(device)
    hooks: dict[str, Any] = {"step_noise": lambda i: noise(draw=i), "callback": callback}
    images = sample(denoiser, initial, condition=_condition(denoiser, batch, draw, device), **hooks, **draw.options())
    if not images.isfinite().all():
        used = sampler_of(denoiser, draw.sampler)
        raise UserError(
            f"samples of {draw.num_steps} steps by {used} are not finite (NaN or infinite): the denoiser's "
            f"weights are not, or this sampler diverges here; train it again, or use sampler=ddim"
        )
    return images if codec is None else codec.decode(images)


def _condition(denoiser: Any, batch: Sequence[int], draw: Draw, device: torch.device | str) -> Condition:
    """Of the images of a batch: labels, or what the network is given of prompts."""
    codec = getattr(denoiser, "codec", None)
    if codec is not None:
        prompts = draw.prompts or codec.prompts
        if not prompts:
            raise UserError("this denoiser is conditioned on text and keeps no prompts: give prompt=<what to draw>")
        return codec.condition([prompts[i % len(prompts)] for i in batch], device)
    labels = draw.labels
    if labels is None and denoiser.num_classes is not None:
        labels = range(denoiser.num_classes)
    return None if labels is None else torch.tensor([labels[i % len(labels)] for i in batch], device=device)
