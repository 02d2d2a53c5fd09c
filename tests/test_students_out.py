"""A denoiser's folder, opened by diffusers alone, draws the images of `pdistill.sample` from the same noise."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils import logging
from safetensors import safe_open
from safetensors.torch import save_file

from pdistill import CosineSchedule, Denoiser, sample
from pdistill.parameterization import Edm, Eps, Flow, V, X, XEps
from pdistill.schedule import BetaSchedule, EdmSchedule, FlowSchedule

LINEAR = tuple((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).tolist())
CHANNELS = 32

KINDS = {  # parameterization, schedule, classes, whether a plain pipeline opens it, whether that clips
    "v": (V(), CosineSchedule(), None, True, True),
    "x, zero SNR": (X(), CosineSchedule(logsnr_min=-torch.inf), None, True, True),
    "eps": (Eps(), CosineSchedule(logsnr_min=-6.0), None, True, True),
    "v of betas": (V(), BetaSchedule(LINEAR), None, True, True),
    "flow": (Flow(), FlowSchedule(), None, True, False),
    "flow, imported": (Flow(), FlowSchedule(train_timesteps=1000), None, True, False),
    "flow, shifted": (Flow(), FlowSchedule(shift=3.0), None, False, True),
    "v of flow": (V(), FlowSchedule(), None, False, True),
    "x_eps": (XEps(), CosineSchedule(), None, False, True),
    "edm": (Edm(), EdmSchedule(), None, False, True),
    "edm, variance preserving": (Edm(), CosineSchedule(), None, False, True),
    "v with classes": (V(), CosineSchedule(), 3, False, True),
    "flow with classes": (Flow(), FlowSchedule(), 3, False, True),
}


def denoiser(kind: str, num_steps: int | None, null_label: int | None = None) -> Denoiser:
    parameterization, schedule, classes, *_ = KINDS[kind]
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=parameterization.channels(1),
        layers_per_block=1,
        block_out_channels=(CHANNELS, CHANNELS),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    )
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    return Denoiser(network, parameterization, schedule, num_steps, ["teacher", num_steps or 0], null_label).eval()


def noise(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(7))


def images(pipeline, **options) -> torch.Tensor:
    """What diffusers draws from `noise()`, in [-1, 1], where it shows them."""
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=3, generator=torch.Generator().manual_seed(7), output_type="np", **options).images
    return torch.from_numpy(drawn).movedim(-1, 1) * 2 - 1


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours.clamp(-1, 1) - theirs).abs().max() < 1e-3)


@pytest.mark.parametrize("num_steps", [1, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_draws_the_same_images(tmp_path, capfd, kind, num_steps):
    *_, classes, plain, clips = KINDS[kind]
    if kind == "flow, shifted" and num_steps == 1:  # a shift moves neither end
        plain, clips = True, False
    student = denoiser(kind, num_steps)
    student.save(tmp_path / "student")
    label = None if classes is None else torch.tensor([0, 1, 2])
    ours = {clip: sample(student, noise(), num_steps, label, clip=clip) for clip in (True, False)}
    logging.set_verbosity_warning()
    if plain:
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
        assert close(ours[clips], images(pipeline, num_inference_steps=num_steps))
    which = {"custom_pipeline": "pipeline"} if plain else {}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True, **which)
    labels = {} if classes is None else {"class_labels": [0, 1, 2]}
    for clip in (True, False):
        assert close(ours[clip], images(pipeline, num_inference_steps=num_steps, clip=clip, **labels))
    assert close(ours[True], images(pipeline))
    with pytest.raises(ValueError, match="must divide"):
        images(pipeline, num_inference_steps=num_steps + 1)
    assert "not used" not in capfd.readouterr().err
    again = Denoiser.load(tmp_path / "student")
    assert again.fingerprint == student.fingerprint
    assert torch.equal(sample(again, noise(), num_steps, label), ours[True])
    with safe_open(tmp_path / "student/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        kept = file.metadata()
    assert json.loads(kept["pdistill_num_steps"]) == num_steps
    assert json.loads(kept["pdistill_grid"]) == [i / num_steps for i in range(1, num_steps + 1)]
    assert json.loads(kept["pdistill_lineage"]) == ["teacher", num_steps]


@pytest.mark.parametrize("kind", ["v", "v of betas", "x_eps", "flow"])
def test_a_teacher_at_every_divisor_of_its_grid(tmp_path, kind):
    """Its folder has the smallest multiple of the plan's first step count that reaches 1,000."""
    teacher = denoiser(kind, None)
    teacher.save(tmp_path / "teacher", grid=32)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "teacher", trust_remote_code=True)
    assert json.loads((tmp_path / "teacher/denoiser.json").read_text())["pipeline_steps"] == 1024
    for num_steps in (8, 32):
        assert close(sample(teacher, noise(), num_steps), images(pipeline, num_inference_steps=num_steps))
    assert torch.equal(sample(Denoiser.load(tmp_path / "teacher"), noise(), 8), sample(teacher, noise(), 8))


def test_more_steps_than_sinusoids(tmp_path):
    """A plain pipeline's network cannot tell them apart; the pipeline file's needs not."""
    student = denoiser("flow", 64)
    student.save(tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    assert close(sample(student, noise(), 64), images(pipeline))


def test_guidance(tmp_path):
    teacher = denoiser("v with classes", 4, null_label=2)
    teacher.save(tmp_path / "teacher")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "teacher", trust_remote_code=True)
    ours = sample(teacher, noise(), 4, torch.tensor([0, 1, 0]), guidance=2.0)
    assert close(ours, images(pipeline, class_labels=[0, 1, 0], guidance=2.0))
    for wrong in ({"class_labels": 2}, {"class_labels": [0, 5]}):
        with pytest.raises(ValueError, match="must be from 0 to 1"):
            images(pipeline, **wrong)


def test_folders_of_earlier_versions_are_read(tmp_path):
    """Their network had a learned embedding, also where no pipeline came with it."""
    student = denoiser("x_eps", 4)
    student.save(tmp_path / "old")
    weights = student.network.state_dict()
    timesteps = student.schedule.timestep(torch.arange(1, 5, dtype=torch.float64) / 4).float()
    weights["time_proj.weight"] = student.network.time_proj(timesteps)
    file = tmp_path / "old/unet/diffusion_pytorch_model.safetensors"
    save_file({k: v.contiguous() for k, v in weights.items()}, file)
    config = {k: v for k, v in student.network.config.items() if not k.startswith("_")}
    config |= {"_class_name": "UNet2DModel", "time_embedding_type": "learned", "num_train_timesteps": 4}
    (tmp_path / "old/unet/config.json").write_text(json.dumps(config))
    again = Denoiser.load(tmp_path / "old")
    assert again.fingerprint == student.fingerprint
    assert torch.equal(sample(again, noise(), 4), sample(student, noise(), 4))
