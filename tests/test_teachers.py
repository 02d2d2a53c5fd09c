"""Teachers from diffusers folders, against diffusers' own schedulers; what is not supported is refused by name."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from pdistill import Denoiser, load_diffusers_teacher, sample
from pdistill.errors import UserError

SMALL = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def write(folder: Path, scheduler, flat: bool = False, variant: str | None = None, **unet) -> diffusers.UNet2DModel:
    """A folder as diffusers writes it, of a network whose output is of the size of noise."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**{"in_channels": 1, "out_channels": 1} | SMALL | unet).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    if flat:
        network.save_pretrained(folder)
        scheduler.save_pretrained(folder)
    else:
        network.save_pretrained(folder / "unet", variant=variant)
        scheduler.save_pretrained(folder / "scheduler")
    return network


def ddim(network, scheduler, noise, num_steps: int, clip: bool, label=None) -> torch.Tensor:
    """diffusers' DDIM with eps recomputed from a clipped x_hat, as the paper's."""
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    config |= {"clip_sample": clip, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    if config.get("beta_schedule") in ("sigmoid", "laplace"):  # which DDIMScheduler lacks
        config |= {"trained_betas": scheduler.betas.tolist(), "beta_schedule": "linear"}
    theirs = diffusers.DDIMScheduler.from_config(config)
    theirs.set_timesteps(num_steps)
    z = noise
    with torch.no_grad():
        for timestep in theirs.timesteps:
            output = network(z, timestep, class_labels=label).sample[:, : noise.shape[1]]
            z = theirs.step(output, timestep, z, use_clipped_model_output=True).prev_sample
    return z


SCHEDULERS = {
    "linear, epsilon": diffusers.DDPMScheduler(beta_schedule="linear"),
    "scaled_linear, v": diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
    "cosine, sample": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
    "sigmoid, epsilon": diffusers.DDPMScheduler(beta_schedule="sigmoid"),
    "laplace, v": diffusers.DDPMScheduler(beta_schedule="laplace", prediction_type="v_prediction"),
    "trained, v": diffusers.DDPMScheduler(
        trained_betas=torch.linspace(1e-3, 0.03, 200).tolist(), num_train_timesteps=200, prediction_type="v_prediction"
    ),
    "2000 steps, v": diffusers.DDPMScheduler(2000, beta_end=0.01, prediction_type="v_prediction"),
    "zero terminal SNR, v": diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_parity_with_diffusers_ddim(tmp_path, kind, clip):
    network = write(tmp_path / "teacher", SCHEDULERS[kind])
    teacher = load_diffusers_teacher(tmp_path / "teacher")
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for num_steps in (4, 20):
        theirs = ddim(network, SCHEDULERS[kind], noise, num_steps, clip)
        ours = sample(teacher, noise, num_steps, clip=clip)
        assert (ours - theirs).abs().max() < 1e-4 * (1 if clip else theirs.abs().max()), num_steps
    teacher.save(tmp_path / "ours", grid=4)
    assert torch.equal(
        sample(Denoiser.load(tmp_path / "ours"), noise, 4, clip=clip), sample(teacher, noise, 4, clip=clip)
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_parity_with_flow_matching(tmp_path, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    network = write(tmp_path / "teacher", scheduler)
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for num_steps in (1, 5, 32):
        scheduler.set_timesteps(sigmas=[1 - k / num_steps for k in range(num_steps)])
        z = noise
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                z = scheduler.step(network(z, timestep).sample, timestep, z).prev_sample
        ours = sample(load_diffusers_teacher(tmp_path / "teacher"), noise, num_steps, clip=False)
        assert (ours - z).abs().max() < 1e-4 * z.abs().max()


def test_steps_between_the_trained_times(tmp_path):
    """32 and 1,024 steps on 1,000: log-SNR falls strictly, timesteps are 1000 t - 1, not below 0."""
    write(tmp_path / "teacher", SCHEDULERS["scaled_linear, v"])
    schedule = load_diffusers_teacher(tmp_path / "teacher").schedule
    for num_steps in (32, 1024):
        t = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
        assert (schedule(t).diff() < 0).all()
        torch.testing.assert_close(schedule.timestep(t), (1000 * t - 1).clamp(min=0))
    zero = SCHEDULERS["zero terminal SNR, v"]
    write(tmp_path / "zero", zero)
    schedule = load_diffusers_teacher(tmp_path / "zero").schedule
    logsnr = schedule(torch.arange(1, 1025, dtype=torch.float64) / 1024)
    assert (logsnr[:-1].diff() < 0).all() and logsnr[:-1].isfinite().all() and logsnr[-1] == -torch.inf


def test_quirks(tmp_path, capsys):
    """The flat layout, half precision files, learned variances, classes, stray keys, pairs as sample_size, one head."""
    scheduler = SCHEDULERS["scaled_linear, v"]
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def check(name: str, network, label=None, tolerance: float = 1e-4) -> None:
        ours = sample(load_diffusers_teacher(tmp_path / name), noise, 4, label, clip=False)
        theirs = ddim(network, scheduler, noise, 4, False, label)
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max(), name

    check("flat", write(tmp_path / "flat", scheduler, flat=True))
    check("half", write(tmp_path / "half", scheduler, variant="fp16"))
    check("pair", write(tmp_path / "pair", scheduler, sample_size=[8, 8]))
    check("heads", write(tmp_path / "heads", scheduler, attention_head_dim=None))
    check("classes", write(tmp_path / "classes", scheduler, num_class_embeds=4), torch.tensor([1, 3]))
    assert load_diffusers_teacher(tmp_path / "classes", null_label=3).num_classes == 3
    learned = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", variance_type="learned_range"
    )
    check("learned", write(tmp_path / "learned", learned, out_channels=2))
    assert "variance (1 of 2 output channels) is dropped" in capsys.readouterr().out
    network = write(tmp_path / "stray", scheduler)
    config = json.loads((tmp_path / "stray/unet/config.json").read_text())
    (tmp_path / "stray/unet/config.json").write_text(json.dumps(config | {"timestep_values": None}))
    check("stray", network)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    network = write(tmp_path / "old", scheduler)
    state = network.state_dict()
    for new, name in old.items():
        state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
    assert any(".query." in k for k in state)
    (tmp_path / "old/unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "old/unet/diffusion_pytorch_model.bin")
    check("old", network)


def test_what_is_not_supported_is_refused_by_name(tmp_path):
    scheduler = SCHEDULERS["scaled_linear, v"]

    def refusal(path) -> str:
        with pytest.raises(UserError) as caught:
            load_diffusers_teacher(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def edited(name: str, file: str, **keys) -> Path:
        write(tmp_path / name, scheduler)
        path = tmp_path / name / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return tmp_path / name

    unet, its_scheduler = "unet/config.json", "scheduler/scheduler_config.json"
    assert "its network is a UNet2DConditionModel" in refusal(edited("a", unet, _class_name="UNet2DConditionModel"))
    assert "remote code (modeling_ddpm.py)" in refusal(edited("b", unet, _module="modeling_ddpm.py"))
    assert "time embedding is 'fourier'" in refusal(edited("c", unet, time_embedding_type="fourier"))
    assert "thresholds dynamically" in refusal(edited("d", its_scheduler, thresholding=True))
    assert "GaussianDDPMScheduler is not" in refusal(edited("e", its_scheduler, _class_name="GaussianDDPMScheduler"))
    zero = edited("f", its_scheduler, prediction_type="epsilon", rescale_betas_zero_snr=True)
    assert "exactly zero SNR" in refusal(zero)
    assert "pickled file" in refusal("edm-cifar10.pkl")
    (tmp_path / "empty").mkdir()
    assert "holds no unet/config.json" in refusal(tmp_path / "empty")
    write(tmp_path / "damaged", scheduler)
    (tmp_path / "damaged/unet/diffusion_pytorch_model.safetensors").write_bytes(b"half")
    assert "diffusers cannot load" in refusal(tmp_path / "damaged")


def test_the_hub_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"the hub does not give it .* give a folder that holds"):
        load_diffusers_teacher("somebody/a-model-that-is-not-here")
