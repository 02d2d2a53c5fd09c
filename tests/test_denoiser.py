"""A Denoiser on disk: ours, diffusers', and what is not one."""

import json
import math

import pytest
import torch
from diffusers import DiffusionPipeline

from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.parameterization import X
from pdistill.randomness import sample_noise, seed_of
from pdistill.sampling import sample
from pdistill.schedule import CosineSchedule, EdmSchedule, FlowSchedule

SCHEDULES = [CosineSchedule(logsnr_min=-math.inf), FlowSchedule(shift=2.0), EdmSchedule(sigma_max=50.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["cosine", "flow", "edm"])
@pytest.mark.parametrize("name", ["eps", "x", "x_eps", "v", "flow", "edm"])
def test_round_trip(tiny, tmp_path, name, schedule):
    denoiser = tiny(name)
    denoiser.schedule = schedule
    denoiser.num_steps, denoiser.lineage = 4, ["teacher", 8, 4]
    denoiser.save(tmp_path / "denoiser")
    again = Denoiser.load(tmp_path / "denoiser")
    assert (again.num_steps, again.lineage, again.schedule) == (4, ["teacher", 8, 4], denoiser.schedule)
    assert again.architecture == denoiser.architecture and again.fingerprint == denoiser.fingerprint
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
    assert "parameterization 'score' is neither built in" in refusal()
    (good / "denoiser.json").write_text(json.dumps(description | {"format": 9}))
    assert "has format 9" in refusal()
    (good / "denoiser.json").write_text("{")
    assert "denoiser.json is damaged" in refusal()
    (good / "denoiser.json").unlink()
    assert "denoiser.json is missing" in refusal()
    with pytest.raises(UserError, match="no denoiser at"):
        Denoiser.load(tmp_path / "absent")


def test_a_directory_of_version_0_1_0(tiny, tmp_path):
    """Format 1: names alone, the schedule's numbers as text, no shape and no fingerprint."""
    denoiser = tiny("x_eps")
    denoiser.save(tmp_path / "old")
    old = {
        "format": 1,
        "parameterization": "x_eps",
        "schedule": {"name": "cosine", "logsnr_min": "-inf", "logsnr_max": "20.0"},
        "num_steps": 8,
        "lineage": ["teacher", 8],
        "null_label": None,
        "pipeline_steps": 8,
    }
    (tmp_path / "old" / "denoiser.json").write_text(json.dumps(old))
    again = Denoiser.load(tmp_path / "old")
    assert again.schedule == CosineSchedule(-math.inf) and again.image_shape == (1, 8, 8) and again.num_steps == 8
    z, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    denoiser.schedule = again.schedule
    assert torch.equal(again(z, t), denoiser(z, t))


def test_weights_that_are_not_finite_are_refused(tiny, tmp_path):
    denoiser = tiny()
    denoiser.network.conv_out.weight.data[0, 0, 0, 0] = math.nan
    denoiser.save(tmp_path / "nan")
    with pytest.raises(UserError, match="not finite"):
        Denoiser.load(tmp_path / "nan")


def test_the_fingerprint_is_of_the_content(tiny, tmp_path):
    """Not of the place, nor of the pipeline's step count; another weight, or another meaning, is another one."""
    one, other = tiny(), tiny(seed=1)
    one.save(tmp_path / "a", grid=4)
    one.save(tmp_path / "b", grid=8)
    names = {Denoiser.load(tmp_path / name).fingerprint for name in "ab"}
    assert names == {one.fingerprint} and other.fingerprint not in names
    one.schedule = CosineSchedule(-10.0)
    assert one.fingerprint not in names


def test_a_dict_of_tensors_is_a_condition(tiny):
    """A label in a dict is the label; another tensor reaches a network that takes one by its name."""
    denoiser = tiny("v", num_classes=4)
    denoiser.null_label = 3
    z, t, label = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    assert torch.equal(denoiser(z, t, label), denoiser(z, t, {"label": label}))
    null = denoiser.null_condition({"label": label, "text": z})
    assert null["label"].tolist() == [3, 3] and null["text"] is z

    class Texts(torch.nn.Module):
        def forward(self, z, timestep, text):
            return z + text

    texts = Denoiser(Texts(), X(), CosineSchedule(), image_shape=(1, 8, 8))
    assert torch.equal(sample(texts, z, 1, {"text": z}, clip=False), 2 * z)


def test_noise_depends_on_its_own_index_alone():
    all_at_once = sample_noise(7, range(6), (1, 4, 4))
    assert torch.equal(all_at_once[4:], sample_noise(7, [4, 5], (1, 4, 4)))
    assert not torch.equal(all_at_once, sample_noise(7, range(6), (1, 4, 4), draw=1))
    assert not torch.equal(all_at_once, sample_noise(8, range(6), (1, 4, 4)))


def test_random_keys_do_not_collide():
    """Of other purposes, other lengths, and other values: numpy's SeedSequence padded (1, 2) and (1, 2, 0) alike."""
    keys = [(), (0,), (1,), (1, 0), (1, 2), (1, 2, 0), (12,), (1, 2, 0, 0)]
    seeds = [seed_of(purpose, *key) for purpose in ("sample", "training") for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert seed_of("sample", 1) == seed_of("sample", 1)
