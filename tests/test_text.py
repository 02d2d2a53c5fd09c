"""Text to image: a tiny Stable-Diffusion-shaped teacher, its students as pipelines, caches, adapters, what is refused.

Everything is made here: words, an autoencoder, a text encoder and a network of a few thousand random weights each.
"""

import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from PIL import Image

from pdistill.commands import cli
from pdistill.dataset import digits

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


def test_x(run):
    print(sorted(str(p.relative_to(run)) for p in run.rglob("*")))
