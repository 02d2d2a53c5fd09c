"""Seconds per image of a run's stages, measured together so that a busy machine slows them alike."""

import statistics
import time
from collections.abc import Sequence

import torch

from pdistill.bars import bar
from pdistill.denoiser import Denoiser
from pdistill.display import MEASURING
from pdistill.randomness import sample_noise
from pdistill.sampling import Condition, sample

BATCH = 64
ROUNDS = 5
BUDGET = 20.0  # seconds for all rounds of all stages; of long samplers a part is timed


def time_stages(
    denoisers: Sequence[Denoiser], num_steps: Sequence[int], device: torch.device
) -> list[dict[str, float | int]]:
    """For each denoiser `seconds_per_image` in batches of 64: the median over rounds in which all take turns.

    `seconds_per_image_spread` is half the range between the quartiles, over the median. A sampler that would take
    longer than its share of 20 seconds is timed for `timed_steps` of its steps, and the seconds are scaled up.
    """
    inputs = [_inputs(denoiser, device) for denoiser in denoisers]
    sampled = [denoiser.for_steps(n) for denoiser, n in zip(denoisers, num_steps, strict=True)]

    def seconds(k: int, steps: int) -> float:
        start = time.perf_counter()
        sample(sampled[k], inputs[k][0], steps, inputs[k][1]).sum().item()
        taken = time.perf_counter() - start
        progress.update()  # after the clock was read
        return taken

    with bar((), "seconds per image", 2 + ROUNDS * len(denoisers), "batch", phase=MEASURING) as progress:
        seconds(0, 1)
        evaluation = seconds(0, 1)
        most = max(1, int(min(1e9, BUDGET / ROUNDS / len(denoisers) / max(evaluation, 1e-6))))
        steps = [min(n, most) for n in num_steps]
        timed = [[seconds(k, n) * num_steps[k] / n for k, n in enumerate(steps)] for _ in range(ROUNDS)]
    rows = []
    for k, values in enumerate(zip(*timed, strict=True)):
        low, median, high = statistics.quantiles(values, n=4)
        spread = (high - low) / 2 / median
        row: dict[str, float | int] = {"seconds_per_image": median / BATCH, "seconds_per_image_spread": spread}
        rows.append(row | ({"timed_steps": steps[k]} if steps[k] < num_steps[k] else {}))
    return rows


def _inputs(denoiser: Denoiser, device: torch.device) -> tuple[torch.Tensor, Condition]:
    noise = sample_noise(0, range(BATCH), denoiser.image_shape).to(device)
    if denoiser.codec is not None:
        return noise, denoiser.codec.condition([""] * BATCH, device)
    label = None if denoiser.num_classes is None else torch.zeros(BATCH, dtype=torch.long, device=device)
    return noise, label
