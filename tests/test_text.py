"""Text to image: a tiny Stable-Diffusion-shaped teacher, its students as pipelines, caches, adapters, what is refused.

Everything is made here: words, an autoencoder, a text encoder and a network of a few thousand random weights each.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from pdistill import Denoiser, load_diffusers_teacher, lora, sample
from pdistill.commands import cli
from pdistill.dataset import digits, image_folder, latents
from pdistill.errors import Interrupted, UserError
from pdistill.generation import Draw, generate
from pdistill.report import card
from pdistill.training.distillation import DistillationModule
from pdistill.training.module import Recipe
from pdistill.training.settings import Optimization
from pdistill.training.teacher import TeacherModule
from pdistill.weighting import truncated_snr

ROOT = Path(__file__).parent.parent
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LENGTH = 24  # tokens of a prompt
UNET = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 8),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_words(folder: Path) -> transformers.CLIPTokenizer:
    """A tokenizer that knows letters alone: each is a token, the last of a word another."""
    folder.mkdir()
    letters = sorted(set("ahandwritten".join(NAMES)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH}))
    return transformers.CLIPTokenizer.from_pretrained(str(folder))


def write_teacher(folder: Path, prediction: str) -> Path:
    """A folder of the shape of SD 1.x."""
    torch.manual_seed(0)
    folder.mkdir()
    tokenizer = write_words(folder / "tokenizer")
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(1, 1, **blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2)
    vae.save_pretrained(folder / "vae")
    diffusers.UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    diffusers.PNDMScheduler(**SCHEDULER, prediction_type=prediction, skip_prk_steps=True).save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """teachers `eps` and `v`, and `images`, 40 digits in folders of their names."""
    place = tmp_path_factory.mktemp("text")
    write_teacher(place / "eps", "epsilon")
    write_teacher(place / "v", "v_prediction")
    data = digits()
    for k in range(40):
        folder = place / "images" / NAMES[int(data.labels[k])]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.images[k, 0].numpy()).save(folder / f"{k:02d}.png")
    return place


@pytest.fixture(scope="module")
def distil(place):
    """distil("name=x") -> the run directory, of `distill.py` in this process."""

    def distil(*overrides: str) -> Path:
        command = ["dataset=image_folder", f"dataset.path={place / 'images'}", "metrics=none"]
        command += ["dataset.prompt='a handwritten {label}'", "steps.updates=2", "steps.updates_last_two=2"]
        command += ["distillation.batch_size=4", "conversion.batch_size=4", "guiding.batch_size=4"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(ROOT / "distill.py"), *command, *overrides])
            patch.chdir(place)
            patch.setenv("PDISTILL_CACHE", str(place / "cache"))
            cli.run("distill")
        return place / "outputs" / next(o.removeprefix("name=") for o in overrides if o.startswith("name="))

    return distil


@pytest.fixture(scope="module")
def run(distil, place) -> Path:
    """SD 1.x's way: epsilon, converted to v, guidance from 1 to 4 in one evaluation, 2 steps, 1 step."""
    return distil("name=eps", f"teacher={place / 'eps'}", "steps.plan=[4,2,1]", "guidance=[1,4]")


def noise(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a handwritten seven", "a handwritten one"]


def drawn(folder: Path, num_steps: int, guidance: float, output: str = "latent") -> torch.Tensor:
    """By StableDiffusionPipeline, without code of ours."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    return by(pipeline, num_steps, guidance, output)


def by(pipeline, num_steps: int, guidance: float, output: str = "latent") -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": num_steps, "guidance_scale": guidance, "output_type": output}
    return pipeline(PROMPTS, latents=noise(), **options).images


@pytest.mark.parametrize(
    ("stage", "num_steps", "guidance"),
    [("teacher", 4, 1), ("teacher", 4, 3), ("converted", 16, 1), ("guided", 4, 2.5), ("steps-0002", 2, 4)],
)
def test_the_pipeline_draws_what_we_draw(run, stage, num_steps, guidance):
    """At every step count that `sample` takes, whether guidance takes two evaluations (the teacher's) or one."""
    denoiser = Denoiser.load(run / stage / "denoiser")
    condition = denoiser.codec.condition(PROMPTS)
    ours = sample(denoiser, noise(), num_steps, condition, guidance=guidance)
    theirs = drawn(run / stage / "denoiser", num_steps, guidance)
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))
    plain = sample(denoiser, noise(), num_steps, condition)
    assert guidance == 1 or not torch.allclose(ours, plain, atol=1e-4)


def test_a_student_of_one_step(run):
    """Its row, its prompts, and its images: decoded, in [0, 1], as the pipeline's."""
    rows = json.loads((run / "summary.json").read_text())
    assert [row["stage"] for row in rows] == ["teacher", "converted", "guided", "steps-0002", "steps-0001"]
    student = Denoiser.load(run / "steps-0001" / "denoiser")
    assert student.guidance == (1, 4) and student.parameterization.name == "v" and student.num_steps == 1
    assert student.codec.prompts == sorted(f"a handwritten {name}" for name in NAMES)
    assert (student.image_shape, student.pixel_shape, student.clips) == ((2, 4, 4), (1, 8, 8), False)
    images = student.codec.decode(sample(student, noise(), 1, student.codec.condition(PROMPTS), guidance=4))
    theirs = drawn(run / "steps-0001" / "denoiser", 1, 4, "pt")
    assert torch.allclose((images / 2 + 0.5).clamp(0, 1), theirs, atol=1e-5)
    with pytest.raises(ValueError, match="guidance=9 must be from 1 to 4"):
        sample(student, noise(), 1, student.codec.condition(PROMPTS), guidance=9)
    with pytest.raises(ValueError, match="conditioned on text"):
        sample(student, noise(), 1)


def test_prompts_are_drawn_in_turn(run):
    """Those that the student was distilled with, or others; whatever the batch."""
    student = Denoiser.load(run / "steps-0001" / "denoiser")
    own = torch.cat([*generate(student, range(12), Draw(1, batch_size=5))])
    given = torch.cat([*generate(student, [10, 11], Draw(1, prompts=[student.codec.prompts[k] for k in (0, 1)]))])
    assert own.shape == (12, 1, 8, 8) and torch.allclose(own[10:], given, atol=1e-6)
    others = torch.cat([*generate(student, [10, 11], Draw(1, prompts=PROMPTS))])
    assert not torch.allclose(others, given, atol=1e-4)


def test_times_are_the_pipelines(place):
    """t = i/N is round(1000 i/N) - 1, its log-SNR that of the betas there; the times between are nobody's."""
    schedule = load_diffusers_teacher(place / "eps").schedule
    scheduler = diffusers.DPMSolverMultistepScheduler(**SCHEDULER, timestep_spacing="trailing", solver_order=1)
    abar = scheduler.alphas_cumprod.double()
    for num_steps in (1, 2, 3, 4, 7, 16, 20, 32, 64, 80, 100, 250, 1000):
        t = torch.arange(num_steps, 0, -1) / num_steps
        scheduler.set_timesteps(num_steps)
        assert torch.equal(schedule.timestep(t).long(), scheduler.timesteps), num_steps
        assert torch.allclose(schedule(t).double(), torch.logit(abar[scheduler.timesteps]), atol=1e-5)
    assert schedule.timestep(torch.zeros(1)) == 0


@pytest.fixture
def data(place, monkeypatch):
    monkeypatch.setenv("PDISTILL_CACHE", str(place / "cache"))
    return image_folder(str(place / "images"), 8, 1, prompt="a handwritten {label}")


def test_latents_and_embeddings(place, data):
    """What they are; that the run made them, and nobody makes them again."""
    codec = load_diffusers_teacher(place / "v").codec
    images = (data.images[:3].float() / 127.5 - 1).clone()
    with torch.no_grad():
        expected = codec.vae.encode(images).latent_dist.mean * codec.vae.config.scaling_factor
    embedded = codec.condition([data.prompts[k] for k in data.labels[:3]])["encoder_hidden_states"]
    made = latents.encoded(data, codec)
    codec.encode = codec.embed = None  # so that it can make no more
    again = latents.encoded(data, codec)
    assert torch.equal(again.latents, made.latents) and again.latents.dtype == torch.float16
    assert torch.allclose(made.latents[:3].float(), expected, atol=1e-3)
    assert torch.allclose(made.embeddings[data.labels[:3]].float(), embedded, atol=2e-3)
    batch = again.batches(4, seed=0, stage=1).batch(0)
    plain = data.batches(4, seed=0, stage=1).batch(0)
    assert torch.equal(batch["condition"]["encoder_hidden_states"], made.embeddings[plain["label"]])
    assert batch["image"].shape == (4, 2, 4, 4) and again.flips is False


def test_a_table_goes_on_where_it_stopped(tmp_path):
    """And what was written to it since is noticed."""
    rows, asked = torch.randn(200, 3), []

    def make(part: slice, until: int = 200) -> torch.Tensor:
        asked.append(part.start)
        if part.start >= until:
            raise KeyboardInterrupt
        return rows[part]

    with pytest.raises(KeyboardInterrupt):
        latents.table(tmp_path, 200, lambda part: make(part, 128), "rows")
    with (tmp_path / "rows.bin").open("ab") as file:
        file.write(b"half a row")
    assert torch.equal(latents.table(tmp_path, 200, make, "rows"), rows.half())
    assert torch.equal(latents.table(tmp_path, 200, make, "rows"), rows.half())
    assert asked == [0, 64, 128, 128, 192]
    content = bytearray((tmp_path / "rows.bin").read_bytes())
    content[7] ^= 1
    (tmp_path / "rows.bin").write_bytes(content)
    with pytest.raises(UserError, match="its content is not what was written"):
        latents.table(tmp_path, 200, make, "rows")
    (tmp_path / "rows.bin").write_bytes(content[:-1])
    with pytest.raises(UserError, match="1199 bytes instead of 1200"):
        latents.table(tmp_path, 200, make, "rows")


def test_hidden_prompts(place):
    """label_dropout puts the empty prompt in the place of whole prompts, and of nothing else."""
    denoiser = load_diffusers_teacher(place / "v")
    settings = Optimization(batch_size=64)
    module = TeacherModule(denoiser, Recipe(settings, truncated_snr, label_dropout=0.5))
    condition = denoiser.codec.condition(PROMPTS * 32)
    torch.manual_seed(0)
    hidden = module.condition_of({"condition": condition})["encoder_hidden_states"]
    empty = denoiser.codec.condition([""])["encoder_hidden_states"]
    is_empty = (hidden == empty).all(2).all(1)
    assert 16 < is_empty.sum() < 48
    assert torch.equal(hidden[~is_empty], condition["encoder_hidden_states"][~is_empty])


LORA = ("steps.plan=[4,2,1]", "guidance=3", "lora.rank=2")


@pytest.fixture(scope="module")
def adapted(distil, place) -> Path:
    """Students of adapters, for one guidance: guided, 2 steps, 1 step."""
    return distil("name=lora", f"teacher={place / 'v'}", *LORA)


def test_adapters_lead_from_the_teacher_to_the_student(adapted, place):
    """The teacher's weights stay, but where the adapters stand; their file makes of its pipeline the student's."""
    teacher, student = (Denoiser.load(adapted / stage / "denoiser") for stage in ("teacher", "steps-0001"))
    before, after = teacher.network.state_dict(), student.network.state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == {f"{name.removesuffix('.lora_A.weight')}.weight" for name in student.adapters if "_A" in name}
    assert {min(weight.shape) for weight in student.adapters.values()} == {2}
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(adapted / "teacher" / "denoiser")
    bare = by(pipeline, 1, 1)
    pipeline.load_lora_weights(adapted / "steps-0001" / "denoiser")
    ours = sample(student, noise(), 1, student.codec.condition(PROMPTS))
    assert torch.allclose(by(pipeline, 1, 1), ours, atol=1e-5) and not torch.allclose(bare, ours, atol=1e-5)


def test_a_student_of_one_guidance_is_not_guided_again(adapted):
    """Whatever guidance_scale the pipeline is called with, 7.5 by default."""
    student = Denoiser.load(adapted / "steps-0002" / "denoiser")
    ours = sample(student, noise(), 2, student.codec.condition(PROMPTS))
    for scale in (1, 7.5):
        assert torch.allclose(drawn(adapted / "steps-0002" / "denoiser", 2, scale), ours, atol=1e-5)
    assert student.network.config["time_cond_proj_dim"] is None and student.guidance == (3, 3)


def test_adapters_are_resumed(adapted, distil, place, monkeypatch, capsys):
    """Stopped after the first update of the last stage: the same command ends with the same weights."""
    command = ("name=again", f"teacher={place / 'v'}", "checkpoint_every_n_updates=1", *LORA)
    losses = DistillationModule.losses

    def stopping(module, batch):
        if module.stage.name == "steps-0001" and module.trainer.global_step == 1:
            raise Interrupted("stopped")
        return losses(module, batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(DistillationModule, "losses", stopping)
        distil(*command)
    assert (place / "outputs" / "again" / "steps-0001" / "last.ckpt").exists()
    again = distil(*command)
    for file in ("pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        theirs = adapted / "steps-0001" / "denoiser" / file
        assert (again / "steps-0001" / "denoiser" / file).read_bytes() == theirs.read_bytes()


def test_adapters_in_a_network_of_pixels(tiny):
    """They are merged into what is saved, to the same images; another rank does not go on from them."""
    student = tiny()
    lora.add(student, 2)
    for name, parameter in student.network.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1) if "lora_" in name else None
    merged = lora.merged(student)
    z, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.9])
    assert torch.allclose(merged(z, t), student(z, t), atol=1e-5)
    again = copy.deepcopy(merged)
    lora.add(again, 2)
    assert torch.allclose(again(z, t), student(z, t), atol=1e-5)
    with pytest.raises(UserError, match="what the student starts from has adapters of rank 2"):
        lora.add(merged, 3)
    with pytest.raises(UserError, match="this Conv2d has none"):
        lora.check(2, torch.nn.Conv2d(1, 1, 1))


def test_captions(tmp_path):
    """metadata.jsonl gives every image its words; equal ones are one prompt."""
    for k in range(3):
        Image.fromarray(np.full((8, 8), 80 * k, np.uint8)).save(tmp_path / f"{k}.png")
    lines = [{"file_name": f"{k}.png", "text": ["a dark square", "a light square"][k % 2]} for k in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    cache = {"cache": str(tmp_path / "cache")}
    data = image_folder(str(tmp_path), 8, 1, prompt="{text}, small", **cache)
    assert data.prompts == ["a dark square, small", "a light square, small"] and data.labels.tolist() == [0, 1, 0]
    others = image_folder(str(tmp_path), 8, 1, prompt="{text}, large", **cache)
    assert others.fingerprint != data.fingerprint
    for prompt, expected in {
        "a square": "would be the same for every image",
        "{label}": "0.png lies in no sub-folder",
        "{caption}": "0.png has no 'caption' in metadata.jsonl",
        "{text": "is no text with names in braces",
    }.items():
        with pytest.raises(UserError, match=expected):
            image_folder(str(tmp_path), 8, 1, prompt=prompt, **cache)
    (tmp_path / "metadata.jsonl").write_text('{"text": 1}')
    with pytest.raises(UserError, match="line 1, must be"):
        image_folder(str(tmp_path), 8, 1, prompt="{text}", **cache)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        image_folder(str(tmp_path), 8, 1, prompt="{text}", **cache)


def edit(file: str, **keys):
    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text()) | keys
        (folder / file).write_text(json.dumps(config))

    return change


UNET_FILE, INDEX = "unet/config.json", "model_index.json"
# What is refused: what is done to the folder, and what the line says.
REFUSED = {
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "holds no text_encoder/config.json"),
    "none named": (edit(INDEX, text_encoder=[None, None]), "works on latents (vae), not on pixels, and has no text"),
    "SDXL": (edit(INDEX, text_encoder_2=["transformers", "CLIPTextModelWithProjection"]), "two text encoders (SDXL)"),
    "SD 3": (edit(INDEX, transformer=["diffusers", "SD3Transformer2DModel"]), "its network is a transformer"),
    "ControlNet": (edit(INDEX, controlnet=["diffusers", "ControlNetModel"]), "steered by a ControlNet"),
    "inpainting": (edit(UNET_FILE, in_channels=5), "takes 5 channels and gives 2, where latents have 2 (inpainting"),
    "SDXL's network": (edit(UNET_FILE, addition_embed_type="text_time"), "more conditions than text"),
    "LCM": (edit(UNET_FILE, time_cond_proj_dim=256), "was taught guidance already"),
    "another text": (edit(UNET_FILE, cross_attention_dim=32), "reads text of 32 numbers a token, and its text"),
    "T5": (edit("text_encoder/config.json", architectures=["T5EncoderModel"]), "its text_encoder is a T5EncoderModel"),
    "VQ": (edit("vae/config.json", _class_name="VQModel"), "its vae is a VQModel, not AutoencoderKL"),
    "flow": (
        lambda f: diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(f / "scheduler"),
        "its scheduler is of flow matching",
    ),
    "no blocks": (edit("vae/config.json", block_out_channels=3), "tell no size of images (TypeError"),
    "no size": (edit(UNET_FILE, sample_size="=1+1"), "tell no size of images ("),
    "no scale": (edit("vae/config.json", scaling_factor={}), "scaling_factor={}, which is no positive number"),
    "a giant": (edit(UNET_FILE, sample_size=2**31), "have more than 201,326,592 numbers"),
    "no UNet of text": (edit(UNET_FILE, _class_name="UNet2DModel"), "what text conditions is a UNet2DConditionModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(place, tmp_path, case):
    change, expected = REFUSED[case]
    folder = shutil.copytree(place / "v", tmp_path / "teacher")
    change(folder)
    with pytest.raises(UserError) as error:
        load_diffusers_teacher(folder)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_the_tokens_of_a_prompt(place, tmp_path):
    """A tokenizer without a limit takes the text encoder's; one whose limit is no number of tokens is refused."""
    folder = shutil.copytree(place / "v", tmp_path / "teacher")
    file = folder / "tokenizer" / "tokenizer_config.json"
    told, codec = json.loads(file.read_text()), load_diffusers_teacher(place / "v").codec
    for length in (None, 10**30):
        file.write_text(json.dumps(told | {"model_max_length": length}))
        assert torch.equal(load_diffusers_teacher(folder).codec.embed(["a zero"]), codec.embed(["a zero"]))
    for length in (1.5, -1):
        file.write_text(json.dumps(told | {"model_max_length": length}))
        with pytest.raises(UserError, match=f"tokenizer says model_max_length={length}: copy"):
            load_diffusers_teacher(folder).codec.embed(["a zero"])


def test_bad_input(place, told, smoke_denoiser, tmp_path):
    """One line each, before any work; where there are captions they are taken."""
    captioned = shutil.copytree(place / "images", tmp_path / "captioned")
    (captioned / "metadata.jsonl").write_text('{"file_name": "zero/00.png"}')
    folder, images = f"teacher={place / 'v'}", f"dataset.path={place / 'images'}"
    ours = ("dataset=image_folder", images, "metrics=none", "name=bad", "steps.plan=[2,1]")
    words = "dataset.prompt='a handwritten {label}'"
    for command, expected in {
        ("distill.py", folder, *ours): "needs images with prompts, and dataset image_folder:images has none",
        ("distill.py", folder, *ours, words, "dataset.image_size=4"): "makes images of 1x8x8",
        ("distill.py", folder, "metrics=none", "name=bad", "dataset=none"): "is conditioned on text: give images",
        ("distill.py", folder, *ours, words, "teacher_null_label=3"): "its empty prompt stands for none",
        ("distill.py", folder, *ours, words, "lora.rank=0"): "lora.rank=0 must be",
        ("distill.py", folder, *ours, words, "lora.rank=2", "method=parallel_decoding"): "keeps the last layer",
        ("distill.py", folder, *ours, words, "method.stochastic=true"): "has no sampler stochastic: use method.stochas",
        ("distill.py", folder, *ours, words, "method=multistep_consistency"): "knows 1000 times: use no more",
        ("distill.py", folder, *ours, f"dataset.path={captioned}"): "has no 'text' in metadata.jsonl",
        ("sample.py", f"denoiser={smoke_denoiser}", "prompt=a seven"): "has no text encoder: leave it out",
        ("sample.py", f"denoiser={smoke_denoiser}", "prompt=3"): "prompt=3 must be a text",
    }.items():
        status, error = told(*command)
        assert status == 2 and expected in error and error.count("\n") == 1, (command, error)


def test_without_the_extra(place, tiny, monkeypatch):
    """One line for what is missing, and where it is got."""
    for package in ("transformers", "peft"):
        monkeypatch.setitem(sys.modules, package, None)
    for use in (lambda: load_diffusers_teacher(place / "v"), lambda: lora.add(tiny(), 2)):
        with pytest.raises(UserError, match=r"needs the package \w+: pip install 'pdistill\[text\]'$"):
            use()


def test_from_the_hub(place, tmp_path, monkeypatch):
    """What tells of it first, then the weights of all components, in full precision alone."""
    there, cache = shutil.copytree(place / "v", tmp_path / "there"), tmp_path / "cache"
    for name in ("model.fp16.safetensors", "pytorch_model.bin"):
        shutil.copy(there / "text_encoder" / "model.safetensors", there / "text_encoder" / name)

    def snapshot_download(model, revision, allow_patterns, ignore_patterns):
        names = [str(file.relative_to(there)) for file in there.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    teacher, original = load_diffusers_teacher("owner/name"), load_diffusers_teacher(place / "v")
    assert teacher.fingerprint == original.fingerprint and teacher.lineage == ["diffusers:owner/name"]
    parts = ("vae", "text_encoder", "tokenizer")
    assert teacher.codec.digest(*parts) == original.codec.digest(*parts)
    assert sorted(file.name for file in cache.glob("text_encoder/*")) == ["config.json", "model.safetensors"]


def test_the_card(run):
    """Says what it is, and the line that draws an image."""
    directory = run / "steps-0001" / "denoiser"
    text = str(card.make(card.Model(Denoiser.load(directory), directory, run, {}), "me/text"))
    assert "pipeline_tag: text-to-image" in text and "A text-conditioned image model that samples" in text
    assert 'pipeline("a handwritten eight", num_inference_steps=1, guidance_scale=2.0)' in text
    assert "`guidance_scale` may be from 1 to 4" in text and "images of 8x8 pixels" in text


@pytest.fixture
def smoke_denoiser(tiny, tmp_path) -> Path:
    denoiser = tiny()
    denoiser.num_steps = 4
    denoiser.save(tmp_path / "denoiser")
    return tmp_path / "denoiser"


def test_sample_and_evaluate(run, told, place):
    """sample.py prompt=...; evaluate.py against the run's own images, in pixels."""
    denoiser = f"denoiser={run / 'steps-0001' / 'denoiser'}"
    command = ("sample.py", denoiser, "num_images=4", "guidance=2", f"output={place / 'grid.png'}")
    assert told(*command, "prompt=a handwritten seven") == (0, "")
    sevens = Image.open(place / "grid.png")
    assert told(*command, "prompt=[a handwritten one,a handwritten two]") == (0, "")
    assert sevens != Image.open(place / "grid.png")
    measured = ("guidance=2", "metrics.num_samples=20", "bootstrap=0", "metrics.extractor.max_updates=1")
    status, error = told("evaluate.py", f"denoiser={run}", *measured)
    assert status == 0, error
