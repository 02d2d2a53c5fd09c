"""A Denoiser on disk: ours, diffusers', and what is not one."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.randomness import sample_noise
from pdistill.sampling import sample
from pdistill.schedule import CosineSchedule


@pytest.mark.parametrize("name", ["eps", "x", "x_eps", "v"])
def test_round_trip(tiny, tmp_path, name):
    denoiser = tiny(name)
    denoiser.schedule = CosineSchedule(logsnr_min=-float("inf"))
    denoiser.num_steps, denoiser.lineage = 4, ["teacher", 8, 4]
    denoiser.save(tmp_path / "denoiser")
    again = Denoiser.load(tmp_path / "denoiser")
    assert (again.num_steps, again.lineage, again.schedule) == (4, ["teacher", 8, 4], denoiser.schedule)
    assert again.architecture == denoiser.architecture
    z, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(again(z, t), denoiser(z, t))
    assert [p.name for p in tmp_path.iterdir()] == ["denoiser"]


@pytest.mark.parametrize("num_steps", [1, 2, 4, 16])
@pytest.mark.parametrize("name", ["eps", "x", "v"])
def test_diffusers_draws_the_same_images(tiny, tmp_path, name, num_steps):
    denoiser = tiny(name, channels=3)
    denoiser.num_steps = num_steps
    denoiser.save(tmp_path / "denoiser")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "denoiser")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(4, generator, num_inference_steps=num_steps, output_type="np").images
    ours = sample(denoiser, noise, num_steps).permute(0, 2, 3, 1)
    assert (torch.from_numpy(theirs) * 2 - 1 - ours).abs().max() < 1e-3


def test_what_is_no_denoiser_is_refused_in_one_line(tiny, tmp_path):
    good = tmp_path / "good"
    tiny().save(good)
    weights = good / "unet" / "diffusion_pytorch_model.safetensors"

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            Denoiser.load(good)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal()
    weights.write_bytes(b"PK\x03\x04 something else")
    assert "damaged" in refusal()
    weights.write_bytes(whole)
    description = json.loads((good / "denoiser.json").read_text())
    (good / "denoiser.json").write_text(json.dumps(description | {"parameterization": "score"}))
    assert "damaged or was written by another program" in refusal()
    (good / "denoiser.json").unlink()
    assert "denoiser.json is missing" in refusal()
    with pytest.raises(UserError, match="no denoiser at"):
        Denoiser.load(tmp_path / "absent")


def test_noise_depends_on_its_own_index_alone():
    all_at_once = sample_noise(7, range(6), (1, 4, 4))
    assert torch.equal(all_at_once[4:], sample_noise(7, [4, 5], (1, 4, 4)))
    assert not torch.equal(all_at_once, sample_noise(7, range(6), (1, 4, 4), draw=1))
    assert not torch.equal(all_at_once, sample_noise(8, range(6), (1, 4, 4)))
