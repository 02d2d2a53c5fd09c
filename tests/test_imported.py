"""`distill.py teacher=<diffusers folder>`: what it takes from the teacher, conversion, no data, and what is refused."""

from pathlib import Path

import diffusers
import pytest
import torch

from pdistill import Denoiser, load_diffusers_teacher, sample
from pdistill.commands.teachers import predicting
from pdistill.dataset import digits
from pdistill.dataset.batches import to_float
from pdistill.method.conversion import Conversion
from pdistill.parameterization import V
from pdistill.steps import Stage
from pdistill.weighting import truncated_snr

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def write(folder: Path, scheduler=None, **unet) -> Path:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**SMALL | unet)
    diffusers.DDPMPipeline(network, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def eps_teacher(tmp_path_factory) -> Path:
    """An epsilon model of digits, trained as diffusers' example does, with its own DDPMScheduler."""
    torch.manual_seed(0)
    network, scheduler = diffusers.UNet2DModel(**SMALL), diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    images = to_float(digits().images)
    for _ in range(400):
        x = images[torch.randint(len(images), (64,))]
        noise, timesteps = torch.randn_like(x), torch.randint(1000, (64,))
        output = network(scheduler.add_noise(x, noise, timesteps), timesteps).sample
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(output, noise).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("eps") / "ddpm-digits"
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder)
    return folder


def converted(teacher: Denoiser, clip: bool, updates: int = 200) -> Denoiser:
    torch.manual_seed(0)
    student, method = predicting(teacher, V()).train(), Conversion(clip)
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    images = to_float(digits().images)
    stage = Stage(2, 8, 0, 1, updates, continuous=True)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - update / updates)
        x = images[torch.randint(len(images), (64,))]
        losses, _ = method.losses(student, teacher, stage, truncated_snr, x, None)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return student.eval()


def test_targets_are_clipped_where_eps_says_little(eps_teacher):
    """The ablation: samples from the same noise as the teacher's own, after a conversion with and without clipping."""
    teacher = load_diffusers_teacher(eps_teacher)
    noise = torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    goal = sample(teacher, noise, 16)
    errors = {
        clip: float((sample(converted(teacher, clip), noise, 16) - goal).square().mean()) for clip in (True, False)
    }
    start = float((sample(predicting(teacher, V()), noise, 16) - goal).square().mean())
    print(f"mean squared difference from the teacher's samples: {errors}, before conversion {start:.3f}")
    assert errors[True] < 0.5 * errors[False] and errors[True] < 0.2 * start
