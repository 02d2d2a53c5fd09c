"""Teachers from diffusers folders, against diffusers' own schedulers; what is not supported is refused by name.

Every row is a folder that diffusers writes, edited where it no longer writes such a thing. `python -m pytest
tests/test_teachers.py -k parity -s` prints the largest differences of docs/teachers.md.
"""

import json
import pickle
import shutil
from pathlib import Path

import diffusers
import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from pdistill import Denoiser, load_diffusers_teacher, sample
from pdistill.errors import UserError
from pdistill.interop.teachers import is_denoiser

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
UNET, SCHEDULER, WEIGHTS = "unet/config.json", "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model"
V = {"prediction_type": "v_prediction"}
SCALED = diffusers.DDPMScheduler(beta_schedule="scaled_linear", **V)  # of the rows that are about the network


def write(folder: Path, scheduler=SCALED, **unet) -> diffusers.UNet2DModel:
    """A folder as diffusers' training example writes it, of a network whose output is of the size of noise."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**SMALL | unet).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    if network.config["class_embed_type"] is None:
        diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder)
    else:
        network.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")
    return network


def edit(file: Path, remove: tuple[str, ...] = (), **keys) -> None:
    config = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def noise_of(network, batch: int = 2) -> torch.Tensor:
    size = network.config["sample_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (batch, network.config["in_channels"], height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


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


def difference(folder: Path, network, scheduler, clip: bool, label=None, null_label=None, steps=(4,)) -> float:
    """The largest one from diffusers' images, clipped in [-1, 1], else of the largest value; and ours saves whole."""
    teacher, noise = load_diffusers_teacher(folder, null_label=null_label), noise_of(network)
    assert teacher.lineage == [f"diffusers:{folder.name}"]
    largest = 0.0
    for num_steps in steps:
        theirs = ddim(network, scheduler, noise, num_steps, clip, label)
        ours = sample(teacher, noise, num_steps, label, clip=clip)
        largest = max(largest, float((ours - theirs).abs().max() / (1 if clip else theirs.abs().max())))
    ours = sample(teacher, noise, 4, label, clip=clip)
    teacher.save(folder.with_name("ours"), grid=4)
    assert torch.equal(sample(Denoiser.load(folder.with_name("ours")), noise, 4, label, clip=clip), ours)
    return largest


# The parity rows: what the scheduler is. Both clipped and not, at 4 and 20 steps.
ddpm, trained = diffusers.DDPMScheduler, torch.linspace(1e-3, 0.03, 200).tolist()
SCHEDULERS = {
    "linear, epsilon": ddpm(),
    "linear, sample": ddpm(prediction_type="sample"),
    "linear, v_prediction": ddpm(**V),
    "scaled_linear, v_prediction": ddpm(beta_schedule="scaled_linear", **V),
    "squaredcos_cap_v2, sample": ddpm(beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
    "squaredcos_cap_v2, epsilon": ddpm(beta_schedule="squaredcos_cap_v2"),
    "sigmoid, epsilon": ddpm(beta_schedule="sigmoid"),
    "laplace, v_prediction": ddpm(beta_schedule="laplace", **V),
    "trained_betas, 200 steps, v_prediction": ddpm(200, trained_betas=trained, **V),
    "linear, 2000 steps, v_prediction": ddpm(2000, beta_end=0.01, **V),
    "rescale_betas_zero_snr, v_prediction": ddpm(rescale_betas_zero_snr=True, **V),
    "rescale_betas_zero_snr, sample": ddpm(rescale_betas_zero_snr=True, prediction_type="sample"),
}


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_parity_with_diffusers_ddim(tmp_path, kind, clip):
    network = write(tmp_path / "teacher", SCHEDULERS[kind])
    largest = difference(tmp_path / "teacher", network, SCHEDULERS[kind], clip, steps=(4, 20))
    print(f"\n{kind:<42}{'clipped' if clip else 'unclipped':<11}{largest:.1e}", end="")
    assert largest < 1e-4


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_parity_with_flow_matching(tmp_path, shift):
    """Of the pipeline class that public ones have, DDPMPipeline."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    network = write(tmp_path / "teacher", scheduler)
    teacher, noise, largest = load_diffusers_teacher(tmp_path / "teacher"), noise_of(network), 0.0
    for num_steps in (1, 5, 32):
        scheduler.set_timesteps(sigmas=[1 - k / num_steps for k in range(num_steps)])
        z = noise
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                z = scheduler.step(network(z, timestep).sample, timestep, z).prev_sample
        ours = sample(teacher, noise, num_steps, clip=False)
        largest = max(largest, float((ours - z).abs().max() / z.abs().max()))
    print(f"\n{f'FlowMatchEulerDiscreteScheduler, shift {shift:g}':<42}{'unclipped':<11}{largest:.1e}", end="")
    assert largest < 1e-4
    teacher.save(tmp_path / "ours")
    again = sample(Denoiser.load(tmp_path / "ours"), noise, 5, clip=False)
    assert torch.equal(again, sample(teacher, noise, 5, clip=False))


@pytest.mark.parametrize(
    "name",
    [f"{family}Scheduler" for family in ("DDIM", "PNDM", "DEISMultistep", "UniPCMultistep", "DDIMInverse", "LCM")]
    + ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
    + ["EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "DDPMParallelScheduler"],
)
def test_the_scheduler_may_be_any_of_betas(tmp_path, name):
    """Whatever samples with it, the betas are those of training; defaults differ between classes."""
    scheduler = getattr(diffusers, name)(**V)
    write(tmp_path / "teacher", scheduler)
    teacher = load_diffusers_teacher(tmp_path / "teacher")
    t = torch.tensor([0.001, 0.25, 1.0], dtype=torch.float64)
    expected = torch.logit(scheduler.alphas_cumprod.double())[[0, 249, 999]]
    torch.testing.assert_close(teacher.schedule(t), expected)
    assert teacher.schedule.timestep(t).tolist() == [0, 249, 999] and teacher.parameterization.name == "v"


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_zero_snr_of_schedulers_that_keep_it_finite(tmp_path, name):
    write(tmp_path / "teacher", getattr(diffusers, name)(rescale_betas_zero_snr=True, **V))
    assert load_diffusers_teacher(tmp_path / "teacher").schedule(torch.ones(1)) == -torch.inf


def test_steps_between_the_trained_times(tmp_path):
    """32 and 1,024 steps on 1,000: log-SNR falls strictly, timesteps are 1000 t - 1, not below 0."""
    write(tmp_path / "teacher")
    schedule = load_diffusers_teacher(tmp_path / "teacher").schedule
    for num_steps in (32, 1024):
        t = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
        assert (schedule(t).diff() < 0).all()
        torch.testing.assert_close(schedule.timestep(t), (1000 * t - 1).clamp(min=0))
    write(tmp_path / "zero", SCHEDULERS["rescale_betas_zero_snr, v_prediction"])
    schedule = load_diffusers_teacher(tmp_path / "zero").schedule
    logsnr = schedule(torch.arange(1, 1025, dtype=torch.float64) / 1024)
    assert (logsnr[:-1].diff() < 0).all() and logsnr[:-1].isfinite().all() and logsnr[-1] == -torch.inf


def flat(folder: Path) -> None:
    for file in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        file.rename(folder / file.name)


def to_bin(folder: Path, rename=lambda state: state) -> None:
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    (folder / f"{WEIGHTS}.safetensors").unlink()
    torch.save(rename(network.state_dict()), folder / f"{WEIGHTS}.bin")


def old_names(folder: Path) -> None:
    def rename(state):
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            state = {k.replace(f".{new}.", f".{old}."): v for k, v in state.items()}
        assert any(".query." in k for k in state)
        return state

    to_bin(folder, rename)


def resave(folder: Path, dtype: torch.dtype = torch.float32, **how) -> None:
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet").to(dtype)
    shutil.rmtree(folder / "unet")
    network.save_pretrained(folder / "unet", **how)


LEARNED = ddpm(beta_schedule="scaled_linear", variance_type="learned_range", **V)
LABEL = torch.tensor([1, 3])
# The quirks: the network's arguments, the scheduler where it matters, and what is done to the folder.
QUIRKS = {
    "the flat layout of the oldest models": ({}, SCALED, flat),
    "no model_index.json": ({}, SCALED, lambda f: (f / "model_index.json").unlink()),
    "half precision files alone": ({}, SCALED, lambda f: resave(f, torch.float16, variant="fp16")),
    "sharded weights": ({}, SCALED, lambda f: resave(f, max_shard_size="300KB")),
    ".bin alone": ({}, SCALED, to_bin),
    "old attention names": ({}, SCALED, old_names),
    "attention_head_dim null is one head": ({"attention_head_dim": None}, SCALED, None),
    "attention_head_dim missing is 8 wide": ({}, SCALED, lambda f: edit(f / UNET, ("attention_head_dim",))),
    "attention_head_dim 16": ({"attention_head_dim": 16}, SCALED, None),
    "stray keys": (
        *({}, SCALED),
        lambda f: (
            edit(f / UNET, timestep_values=None, _name_or_path="x"),
            edit(f / SCHEDULER, trained_betas=None, timestep_values=None),
        ),
    ),
    "sample_size a pair": ({"sample_size": (8, 8)}, SCALED, None),
    "images that are not square": ({"sample_size": (8, 16)}, SCALED, None),
    "center_input_sample": ({"center_input_sample": True}, SCALED, None),
    "the first models' embedding and padding": (
        {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6},
        *(SCALED, None),
    ),
    "no block in the middle": ({"mid_block_type": None}, SCALED, None),
    "classes": ({"num_class_embeds": 4}, SCALED, None),
    "learned variances": ({"out_channels": 2}, LEARNED, None),
    "learned variances of classes in colour": (
        {"in_channels": 3, "out_channels": 6, "num_class_embeds": 4},
        *(LEARNED, None),
    ),
    "prediction_type missing is epsilon": ({}, ddpm(), lambda f: edit(f / SCHEDULER, ("prediction_type",))),
    "clip_sample missing": ({}, SCALED, lambda f: edit(f / SCHEDULER, ("clip_sample",))),
    "fixed_large": ({}, ddpm(beta_schedule="scaled_linear", variance_type="fixed_large", **V), None),
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_quirks(tmp_path, quirk, capsys):
    arguments, scheduler, change = QUIRKS[quirk]
    folder = tmp_path / "teacher"
    network = write(folder, scheduler, **arguments)
    if change is not None:
        change(folder)
        network = network.half().float() if "half" in quirk else network
    label = LABEL if "num_class_embeds" in arguments else None
    assert difference(folder, network, scheduler, clip=False, label=label) < 1e-4
    assert capsys.readouterr().out.count("is dropped") == ("learned" in quirk)


def test_null_label(tmp_path):
    network = write(tmp_path / "teacher", num_class_embeds=4)
    teacher = load_diffusers_teacher(tmp_path / "teacher", null_label=3)
    assert teacher.num_classes == 3 and teacher.null_condition(LABEL).tolist() == [3, 3]
    assert difference(tmp_path / "teacher", network, SCALED, False, LABEL, null_label=3) < 1e-4
    assert load_diffusers_teacher(tmp_path / "teacher").num_classes == 4
    assert "the last, 3" in refusal(tmp_path / "teacher", null_label=0)
    write(tmp_path / "unconditional")
    assert "has no classes: leave it out" in refusal(tmp_path / "unconditional", null_label=3)


def refusal(path, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_diffusers_teacher(path, **arguments)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


class Runs:
    """A pickle that leaves a file where it runs."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def malicious(folder: Path) -> None:
    (folder / f"{WEIGHTS}.safetensors").unlink()
    torch.save({"conv_in.weight": Runs(folder / "ran")}, folder / f"{WEIGHTS}.bin")


def not_finite(folder: Path) -> None:
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    network.conv_out.bias.data.fill_(torch.nan)
    network.save_pretrained(folder / "unet")


def only(folder: Path, *files: str) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    for file in files:
        (folder / file).write_bytes(pickle.dumps(Runs(folder / "ran")))


def set_unet(**keys):
    return lambda folder: edit(folder / UNET, **keys)


def set_scheduler(**keys):
    return lambda folder: edit(folder / SCHEDULER, **keys)


def set_index(**keys):
    return lambda folder: edit(folder / "model_index.json", **keys)


def sigmas(name: str):
    return lambda folder: getattr(diffusers, name)().save_pretrained(folder / "scheduler")


# What is refused: what is done to a good folder, and what the line says.
REFUSED = {
    "conditioned on text": (set_unet(_class_name="UNet2DConditionModel"), "it holds no vae/config.json"),
    "a text encoder": (set_index(text_encoder=["transformers", "CLIPTextModel"]), "is a UNet2DConditionModel"),
    "latents": (set_index(vae=["diffusers", "AutoencoderKL"]), "works on latents (vae)"),
    "old latents": (set_index(vqvae=["diffusers", "VQModel"]), "works on latents (vqvae)"),
    "transformers": (set_index(transformer=["diffusers", "DiTTransformer2DModel"]), "its network is a transformer"),
    "code of the network": (set_unet(_module="modeling_ddpm.py"), "remote code (modeling_ddpm.py)"),
    "code of the oldest pipelines": (set_index(_class_name="DDPM", _module="modeling_ddpm.py"), "remote code (mod"),
    "code of the pipeline": (set_index(_class_name=["pipeline", "MyPipeline"]), "remote code (['pipeline', 'MyPi"),
    "code by auto_map": (set_unet(auto_map={"AutoModel": "code.Net"}), "remote code ({'AutoModel': 'code.Net'})"),
    "code of the scheduler": (set_scheduler(_module="schedule.py"), "remote code (schedule.py)"),
    "UNetModel": (set_unet(_class_name="UNetModel"), "UNetModel, of an early diffusers"),
    "UNetUnconditionalModel": (set_unet(_class_name="UNetUnconditionalModel"), "UNetUnconditionalModel, of an early"),
    "GaussianDDPMScheduler": (
        set_scheduler(_class_name="GaussianDDPMScheduler"),
        "has no scheduler GaussianDDPMScheduler: save its",
    ),
    "no scheduler's class": (set_scheduler(_class_name="UNet2DModel"), "has no scheduler UNet2DModel"),
    "diffusion_model.pt": (lambda f: only(f, "diffusion_model.pt"), "diffusion_model.pt is pickled, and never opened"),
    "EDM's pickle in a folder": (lambda f: only(f, "edm-cifar10.pkl"), "edm-cifar10.pkl is pickled, and never opened"),
    "nothing": (lambda f: only(f), "holds no unet/config.json and no config.json"),
    "fourier times": (set_unet(time_embedding_type="fourier"), "time embedding is 'fourier' (variance exploding)"),
    "learned times": (set_unet(time_embedding_type="learned"), "'learned', which has no times between its own"),
    "labels as times": (set_unet(class_embed_type="timestep"), "class_embed_type is 'timestep'"),
    "embedded labels": (set_unet(class_embed_type="identity"), "class_embed_type is 'identity'"),
    "variance exploding": (sigmas("EDMEulerScheduler"), "EDMEulerScheduler has no betas"),
    "IPNDM": (sigmas("IPNDMScheduler"), "IPNDMScheduler has no betas"),
    "consistency": (sigmas("CMStochasticIterativeScheduler"), "CMStochasticIterativeScheduler has no betas"),
    "flow by another class": (sigmas("FlowMatchHeunDiscreteScheduler"), "write it as FlowMatchEulerDiscreteScheduler"),
    "flow by a prediction type": (
        lambda f: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ).save_pretrained(f / "scheduler"),
        "write it as FlowMatchEulerDiscreteScheduler",
    ),
    "a shift by resolution": (
        lambda f: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(f / "scheduler"),
        "use_dynamic_shifting, where a fixed shift",
    ),
    "continuous timesteps": (
        lambda f: diffusers.EulerDiscreteScheduler(timestep_type="continuous").save_pretrained(f / "scheduler"),
        "logarithm of sigma",
    ),
    "thresholding": (set_scheduler(thresholding=True), "thresholds dynamically"),
    "an unknown prediction": (set_scheduler(prediction_type="score"), "prediction_type is 'score', not one of epsilon"),
    "unknown betas": (set_scheduler(beta_schedule="mine"), "cannot load the scheduler"),
    "epsilon at zero SNR": (
        set_scheduler(prediction_type="epsilon", rescale_betas_zero_snr=True),
        "exactly zero SNR",
    ),
    "epsilon at a last beta of 1": (
        set_scheduler(prediction_type="epsilon", num_train_timesteps=3, trained_betas=[0.1, 0.5, 1.0]),
        "exactly zero SNR",
    ),
    "fewer betas than steps": (set_scheduler(trained_betas=[0.1, 0.2, 0.3]), "3 trained_betas for num_train_timesteps"),
    "betas of no noise": (set_scheduler(beta_start=0.0, beta_end=0.0), "cannot be a schedule"),
    "steps in words": (set_scheduler(num_train_timesteps="many"), "its num_train_timesteps is"),
    "sample_size null": (set_unet(sample_size=None), 'write "sample_size": 32, or [height, width]'),
    "sample_size missing": (lambda f: edit(f / UNET, ("sample_size",)), "does not tell the size of its images"),
    "sample_size of three": (set_unet(sample_size=[8, 8, 8]), "sample_size is [8, 8, 8]"),
    "sample_size in words": (set_unet(sample_size="8"), "sample_size is '8'"),
    "channels that do not fit": (set_unet(in_channels=3), "size mismatch for conv_in.weight"),
    "a key of another network": (set_unet(layers_per_block=2), "do not fit its config.json (missing keys"),
    "unknown blocks": (set_unet(down_block_types=["X", "Y"]), "cannot load the network"),
    "a list where a number belongs": (set_unet(layers_per_block=[1, 1]), "cannot load the network"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "holds no scheduler/scheduler_config.json"),
    "no weights": (lambda f: (f / f"{WEIGHTS}.safetensors").unlink(), "holds no diffusion_pytorch_model.safetensors"),
    "damaged network's JSON": (lambda f: (f / UNET).write_text("{"), "config.json is damaged"),
    "damaged scheduler's JSON": (lambda f: (f / SCHEDULER).write_text("[]"), "scheduler_config.json is damaged"),
    "damaged index": (lambda f: (f / "model_index.json").write_bytes(b"\xff"), "model_index.json is damaged"),
    "damaged weights": (lambda f: (f / f"{WEIGHTS}.safetensors").write_bytes(b"half"), "its files are damaged"),
    "weights that are no numbers": (not_finite, "not finite (NaN or infinite)"),
    "code in .bin": (malicious, "or it holds more than weights, which never run"),
    "a file of the folder": (lambda f: (shutil.rmtree(f), f.write_text("x")), "is a file: give the diffusers folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path, case):
    change, expected = REFUSED[case]
    folder = tmp_path / "teacher"
    write(folder)
    change(folder)
    assert expected in refusal(folder)
    assert not (folder / "ran").exists()


def test_refused_networks_of_other_widths(tmp_path):
    write(tmp_path / "unsaid", out_channels=2)
    assert 'write "variance_type": "learned_range"' in refusal(tmp_path / "unsaid")
    write(tmp_path / "masked", in_channels=2)
    assert "takes 2 channels and gives 1" in refusal(tmp_path / "masked")


def test_a_denoiser_is_given_as_it_is(tmp_path):
    write(tmp_path / "teacher")
    load_diffusers_teacher(tmp_path / "teacher").save(tmp_path / "ours", grid=4)
    assert is_denoiser(tmp_path / "ours") and not is_denoiser(tmp_path / "teacher") and not is_denoiser("owner/name")
    assert "is a denoiser of pdistill, not a diffusers folder" in refusal(tmp_path / "ours")


@pytest.mark.parametrize("path", ["./x", "../x", "/x", "~/x", "a/b/c", "x", "src/x", "a b/c"])
def test_paths_are_not_asked_of_the_hub(path, monkeypatch, tmp_path):
    (tmp_path / "here" / "src").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert "there is no folder" in refusal(path)


def test_a_pickled_file_is_not_opened():
    assert "pickled file" in refusal("edm/cifar10.pkl")


@pytest.mark.parametrize("half", [False, True])
def test_the_hub(tmp_path, monkeypatch, half):
    """The configuration first, and no weights of what is refused; then the best of the weights; its name is kept."""
    there, cache = tmp_path / "there", tmp_path / "cache"
    write(there)
    (there / f"{WEIGHTS}.safetensors").rename(there / f"{WEIGHTS}.fp16.safetensors")
    if not half:
        write(there)
        torch.save({}, there / f"{WEIGHTS}.bin")

    def snapshot_download(model, revision, allow_patterns, ignore_patterns):
        assert (model, revision) == ("owner/name", "v1")
        names = [str(file.relative_to(there)) for file in there.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_diffusers_teacher("owner/name", revision="v1").lineage == ["diffusers:owner/name"]
    weights = [file.name for file in cache.rglob("*") if file.suffix in (".safetensors", ".bin")]
    assert weights == [f"diffusion_pytorch_model{'.fp16' if half else ''}.safetensors"]
    shutil.rmtree(cache)
    edit(there / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    assert "works on latents" in refusal("owner/name", revision="v1")
    assert not [*cache.rglob("*.safetensors")]
    assert "is a folder, and revision=v1 is for models on the hub" in refusal(there, revision="v1")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RepositoryNotFoundError, "no model on the hub that you may read: check the name, or, if it is private"),
        (GatedRepoError, "is gated: accept its terms"),
        (RevisionNotFoundError, "has no revision v9: give a branch, tag or commit"),
    ],
)
def test_what_the_hub_answers(monkeypatch, error, expected):
    def snapshot_download(*_, **__):
        response = httpx.Response(404, request=httpx.Request("GET", "https://example.org"))
        raise error("404 Client Error.\n\nMore lines.", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert expected in refusal("owner/name", revision="v9")


def test_the_hub_offline(monkeypatch, tmp_path):
    """What the cache has is read; of what it has not, the line says which folder to give."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1 does before the start
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    line = refusal("somebody/a-model-that-is-not-here")
    assert "the hub does not give it" in line and "give a folder that holds model_index.json, unet/config.json" in line
    cached = tmp_path / "models--owner--name"
    network = write(cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    z, t = noise_of(network), torch.full((2,), 0.5)
    there = load_diffusers_teacher(cached / "snapshots" / "0123abc")
    assert torch.equal(load_diffusers_teacher("owner/name")(z, t), there(z, t))


def test_the_benchmark_trains_teachers_and_goes_on_where_it_was(tmp_path, monkeypatch):
    """Killed after its first checkpoint, it ends with the same weights; what it writes is a teacher."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))
    import diffusers_teachers as benchmark

    monkeypatch.setattr(benchmark, "CHECKPOINT_EVERY", 2)
    (tmp_path / "images").mkdir()
    for k in range(4):
        Image.new("RGB", (32, 32), (60 * k, 0, 0)).save(tmp_path / "images" / f"{k}.jpg")

    def run(output: str) -> Path:
        words = ["--data", tmp_path / "images", "--output", tmp_path / output, "--updates", 4, "--batch-size", 2]
        monkeypatch.setattr("sys.argv", ["diffusers_teachers.py", *map(str, words), "--teachers", "cosine"])
        benchmark.main()
        return tmp_path / output / "teacher-cosine"

    undisturbed, step = run("undisturbed"), benchmark.Training.step

    def killed(training, *arguments):
        if training.done == 3:
            raise KeyboardInterrupt
        return step(training, *arguments)

    monkeypatch.setattr(benchmark.Training, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.setattr(benchmark.Training, "step", step)
    again, teacher = load_diffusers_teacher(run("killed")), load_diffusers_teacher(undisturbed)
    assert again.fingerprint == teacher.fingerprint
    assert teacher.image_shape == (3, 32, 32) and teacher.parameterization.name == "eps"
