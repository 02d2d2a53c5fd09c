"""Parity with numbers that the paper authors' own code gave (float64)."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pdistill import weighting
from pdistill.denoiser import Denoiser
from pdistill.parameterization import broadcast, x_to_eps, x_to_v
from pdistill.registry import find
from pdistill.sampling import sample
from pdistill.schedule import CosineSchedule
from pdistill.target import distillation_target
from pdistill.training.module import weighted_loss

alpha_sigma = CosineSchedule().alpha_sigma

with np.load(Path(__file__).parent / "data" / "diffusion.npz") as file:
    GOLDEN = {k: torch.from_numpy(file[k]) for k in file.files}
PARAMETERIZATIONS = ["eps", "x", "x_eps", "v"]
WEIGHTINGS = ["constant", "snr", "truncated_snr", "snr_plus_one"]


def images(key: str) -> torch.Tensor:
    """Channels last -> channels first."""
    return GOLDEN[key].movedim(-1, -3)


class StandIn(torch.nn.Module):
    """The network of the golden data: c sin(a z + b logsnr + d), for x_eps with a second half in cosines."""

    def __init__(self, role: str, two_images: bool) -> None:
        super().__init__()
        self.sine = {"student": (0.7, 1.3, 0.1, 0.0), "teacher": (0.6, 1.1, -0.05, 0.2)}[role]
        self.cosine = {"student": (0.5, 0.9, -0.05), "teacher": (0.4, 0.8, 0.03)}[role] if two_images else None

    def forward(self, z, timestep, class_labels=None):
        logsnr = broadcast(-2 * torch.log(torch.tan(timestep / 1000 * torch.pi / 2)), z)
        c, a, b, d = self.sine
        output = c * torch.sin(a * z + b * logsnr + d)
        if self.cosine:
            c, a, b = self.cosine
            output = torch.cat([output, c * torch.cos(a * z + b * logsnr)], dim=1)
        return SimpleNamespace(sample=output)


def stand_in(role: str, name: str) -> Denoiser:
    return Denoiser(StandIn(role, name == "x_eps"), find("parameterization", name)(), CosineSchedule())


def assert_close(ours: torch.Tensor, golden: torch.Tensor) -> None:
    assert (ours - golden).norm() <= 1e-9 * golden.norm()


def test_schedule():
    assert_close(CosineSchedule()(GOLDEN["schedule/t"]), GOLDEN["schedule/logsnr"])


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("clip", [0, 1])
def test_conversions(name, clip):
    z, t = images("continuous/z"), GOLDEN["continuous/t"]
    alpha, sigma = (broadcast(a, z) for a in alpha_sigma(CosineSchedule()(t)))
    x = stand_in("student", name)(z, t)
    if clip:
        x = x.clamp(-1, 1)
    for word, ours in {"x": x, "eps": x_to_eps(x, z, alpha, sigma), "v": x_to_v(x, z, alpha, sigma)}.items():
        assert_close(ours, images(f"predict/{name}/clip={clip}/model_{word}"))


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("weight", WEIGHTINGS)
def test_teacher_loss(name, weight):
    x, t = images("x"), GOLDEN["continuous/t"]
    x_hat = stand_in("student", name)(images("continuous/z"), t)
    assert_close(
        weighted_loss(getattr(weighting, weight), x_hat, x, CosineSchedule()(t)), GOLDEN[f"loss/{name}/{weight}"]
    )


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("weight", WEIGHTINGS)
def test_distillation_loss(name, weight, num_steps):
    t = (GOLDEN[f"discrete/{num_steps}/i"] + 1).double() / num_steps
    logsnr = CosineSchedule()(t)
    alpha, sigma = (broadcast(a, images("x")) for a in alpha_sigma(logsnr))
    z = alpha * images("x") + sigma * images("eps")
    target = distillation_target(stand_in("teacher", name), z, t, num_steps)
    losses = weighted_loss(getattr(weighting, weight), stand_in("student", name)(z, t), target, logsnr)
    assert_close(losses, GOLDEN[f"distill_loss/{name}/{weight}/{num_steps}"])


SAMPLES = [k for k in GOLDEN if re.match(r"sample/\w+/(ddim|ancestral)", k)]


@pytest.mark.parametrize("key", SAMPLES)
def test_samples(key):
    _, name, sampler, num_steps, clip = key.split("/")
    kind, _, variance = sampler.partition("-")
    if variance.startswith("medium"):
        variance = float(variance.split(":")[1])
    ours = sample(
        stand_in("student", name),
        images(f"sample/{name}/init"),
        int(num_steps),
        sampler=kind,
        variance=variance or "large",
        clip=clip == "clip=1",
        step_noise=images(f"sample/noise/{num_steps}"),
    )
    assert_close(ours, images(key))
