"""Stable-Diffusion-shaped folders: latents of an autoencoder, denoised by a UNet2DConditionModel that reads text.

A folder is what `StableDiffusionPipeline.save_pretrained` writes of the shapes of SD 1.x and 2.x. The UNet becomes a
Denoiser of latents; everything else of the folder is its `Codec`. A student's directory is such a folder again:

    unet/                                 the student's weights
    scheduler/                            first-order DPM-Solver++, trailing, without thresholding: DDIM at our times
    vae/ text_encoder/ tokenizer/ ...     the teacher's files, linked
    prompts.json                          what samples are drawn of by default
"""

import functools
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import diffusers
import torch
from torch import Tensor

from pdistill import claims
from pdistill.errors import UserError, first_line
from pdistill.files import digest_of, digest_of_file, read_json, write_json
from pdistill.interop.students import PREDICTION_TYPES, UNET_WEIGHTS, save_weights
from pdistill.network import GUIDANCE_FEATURES
from pdistill.reading import tensors_of
from pdistill.schedule import BetaSchedule, betas

if TYPE_CHECKING:
    from pdistill.denoiser import Denoiser

CLASSES = {  # as model_index.json names them
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],  # which older folders call by a name that is gone
}
NEEDED = ("vae", "text_encoder", "tokenizer")
LINKED = tuple(CLASSES)
PROMPTS = "prompts.json"
MOST_PROMPTS = 10_000  # that a directory keeps, evenly spread
DECODED_AT_ONCE = 8  # images
REMEMBERED = 256  # prompts whose embeddings are kept in memory
WEIGHTS = (".safetensors", ".bin")
COPIES = (".bin", ".msgpack", ".h5", ".ckpt")  # beside .safetensors
GUIDANCE_IGNORED = "_takes_no_guidance"  # in unet/config.json: its input is for diffusers alone, and changes nothing
WITHOUT_GUIDANCE = {"time_cond_proj_dim": None}
COND_PROJ = "time_embedding.cond_proj.weight"
# What unet/config.json must say, or not say at all, and what it is otherwise.
PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
    "addition_embed_type": ((None,), "it takes more conditions than text (addition_embed_type: SDXL, Kandinsky, ...)"),
    "class_embed_type": ((None,), "it takes labels beside text (class_embed_type: unCLIP, upscalers, ...)"),
    "num_class_embeds": ((None,), "it takes labels beside text (num_class_embeds: upscalers)"),
    "encoder_hid_dim": ((None,), "its text goes through a projection (encoder_hid_dim: DeepFloyd IF, Kandinsky)"),
    "time_cond_proj_dim": ((None,), "it was taught guidance already (time_cond_proj_dim: LCM)"),
    "time_embedding_type": ((None, "positional"), "its time embedding is of another kind (time_embedding_type)"),
}
FOREIGN = {  # components of model_index.json beside a text encoder
    "text_encoder_2": "it has two text encoders (SDXL)",
    "text_encoder_3": "it has three text encoders (SD 3)",
    "transformer": "its network is a transformer (SD 3, Flux, ...)",
    "controlnet": "it is steered by a ControlNet: give the model without it",
    "image_encoder": "it is conditioned on images (image_encoder)",
    "prior": "it is conditioned on a prior's images",
}


class Codec:
    """The autoencoder, tokenizer and text encoder of a folder, each read when it is first asked for.

    Not a module: what holds one has nothing of it among its weights, and copies share it.
    """

    def __init__(self, folder: Path, prompts: Sequence[str] | None = None) -> None:
        """Of a folder that `refusal` has nothing to say about. Prompts are by default those that it keeps."""
        self.folder = folder
        kept = read_json(folder / PROMPTS, [], "copy the folder again") if prompts is None else prompts
        if isinstance(kept, str | dict) or not all(isinstance(prompt, str) for prompt in kept):
            raise UserError(f"{folder / PROMPTS} is damaged: it is no list of texts; copy the folder again")
        self.prompts: list[str] = list(kept)
        self._remembered: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the UNet's own size of latents stands for."""
        return pixel_shape_of(_read(self.folder / "unet"), _read(self.folder / "vae"))

    @functools.cached_property
    def vae(self) -> Any:
        """The autoencoder, in eval mode, float32."""
        return self._component("vae", diffusers.AutoencoderKL)

    @functools.cached_property
    def text_encoder(self) -> Any:
        """The text encoder, in eval mode, float32."""
        return self._component("text_encoder", check_packages().CLIPTextModel)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self._component("tokenizer", check_packages().CLIPTokenizer)

    def _component(self, name: str, kind: Any) -> Any:
        diffusers.utils.logging.disable_progress_bar()
        options = {} if name == "tokenizer" else {"torch_dtype": torch.float32}
        try:
            if name != "tokenizer":
                self._check_claims(name, kind)
            loaded = kind.from_pretrained(str(self.folder / name), **options)
        except Exception as error:  # transformers', diffusers', safetensors' and torch's own
            raise UserError(
                f"{self.folder / name} cannot be loaded ({type(error).__name__}: {first_line(error)}): copy the folder "
                f"again"
            ) from error
        return loaded if name == "tokenizer" else loaded.eval().requires_grad_(False)

    def _check_claims(self, name: str, kind: Any) -> None:
        """Raises ValueError for a component that claims more than its weights' files can hold."""
        config = _read(self.folder / name)
        claims.check_layers(config)
        known = getattr(kind, "config_class", None)  # of transformers' models
        files = [file for file in _files(self.folder / name) if file.suffix in WEIGHTS]
        claims.check_bytes(lambda: kind(known.from_dict(config)) if known else kind.from_config(config), files)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> latents (B, c, h, w): the posterior's mean, times `scaling_factor`."""
        vae = self.vae.to(images.device)
        return vae.encode(images).latent_dist.mean * vae.config["scaling_factor"]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> images (B, C, H, W), about [-1, 1]."""
        vae = self.vae.to(latents.device)
        parts = (latents / vae.config["scaling_factor"]).split(DECODED_AT_ONCE)
        return torch.cat([vae.decode(part).sample for part in parts])

    def condition(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """{"encoder_hidden_states": (B, L, D)} of B prompts, each as the pipeline embeds it."""
        wanted = dict.fromkeys(prompts)
        if len(self._remembered | wanted) > REMEMBERED:
            self._remembered = {}
        if new := [prompt for prompt in wanted if prompt not in self._remembered]:
            self._remembered |= dict(zip(new, self.embed(new, device).cpu(), strict=True))
        states = torch.stack([self._remembered[prompt] for prompt in prompts])
        return {"encoder_hidden_states": states.to(device, non_blocking=True)}  # a training step must not wait

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """The last hidden states of the text encoder (B, L, D), of prompts cut or padded to its L tokens."""
        encoder = self.text_encoder.to(device)
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self._length,
            truncation=True,
            return_tensors="pt",
        )
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        return encoder(tokens.input_ids.to(device), attention_mask=mask)[0]

    @property
    def _length(self) -> int:
        """L, the tokens of a prompt. Raises UserError where the tokenizer's files say none."""
        length = self.tokenizer.model_max_length
        if type(length) is not int or length < 1:
            raise UserError(f"{self.folder / 'tokenizer'} says model_max_length={length!r}: copy the folder again")
        return min(length, self.text_encoder.config.max_position_embeddings)

    def digest(self, *components: str) -> str:
        """16 hexadecimal digits that name the content of these folders."""
        files = [file for name in components for file in _files(self.folder / name)]
        return digest_of(f"{file.parent.name}/{file.name} {digest_of_file(file)}" for file in files)


def pixel_shape_of(unet: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the images, by the configurations. Raises KeyError, TypeError or ValueError where they tell none."""
    claims.check_layers(vae)
    size, factor = unet["sample_size"], 2 ** (len(vae["block_out_channels"]) - 1)
    height, width = size if isinstance(size, list) else (size, size)
    claims.check_shape(shape := (vae["in_channels"], height * factor, width * factor))
    return shape


def is_text_to_image(index: dict[str, Any], unet: dict[str, Any]) -> bool:
    """Whether model_index.json and unet/config.json are of a model that text conditions."""
    return unet.get("_class_name") == "UNet2DConditionModel" or "text_encoder" in index


def refusal(folder: Path, unet: dict[str, Any]) -> str | None:
    """Why such a folder cannot be a teacher, by its configurations; None where it can."""
    if unet.get("_class_name") != "UNet2DConditionModel":
        return f"its network is a {unet.get('_class_name')}, and what text conditions is a UNet2DConditionModel"
    if reason := next((why for key, (known, why) in PLAIN.items() if unet.get(key) not in known), None):
        return reason
    for name in NEEDED:
        kind = CLASSES[name][1]
        file = folder / name / ("tokenizer_config.json" if name == "tokenizer" else "config.json")
        if not file.exists():
            return f"it holds no {file.relative_to(folder)}, and a UNet2DConditionModel needs latents and text"
        config = _read(folder / name)
        found = config.get("_class_name") or (config.get("architectures") or [kind])[0]
        if name != "tokenizer" and found != kind:
            return f"its {name} is a {found}, not {kind}"
    vae, text = _read(folder / "vae"), _read(folder / "text_encoder")
    channels, latents = (unet.get("in_channels", 4), unet.get("out_channels", 4)), vae.get("latent_channels", 4)
    if channels != (latents, latents):
        why = "inpainting, or conditions by concatenation" if channels[0] > latents else "not what is denoised"
        return f"its network takes {channels[0]} channels and gives {channels[1]}, where latents have {latents} ({why})"
    try:
        pixel_shape_of(unet, vae)
    except (KeyError, TypeError, ValueError) as error:
        return f"its configurations tell no size of images ({type(error).__name__}: {first_line(error)})"
    scale = vae.get("scaling_factor", 0.18215)  # as diffusers has it
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        return f"its vae says scaling_factor={scale!r}, which is no positive number"
    if unet.get("cross_attention_dim", 1280) != text.get("hidden_size"):
        return (
            f"its network reads text of {unet.get('cross_attention_dim')} numbers a token, and its text encoder gives "
            f"{text.get('hidden_size')}"
        )
    return None


def write(denoiser: "Denoiser", weights: dict[str, Tensor], metadata: dict[str, str], directory: Path) -> None:
    """A StableDiffusionPipeline: its `num_inference_steps=N, guidance_scale=g` are those of `sample`.

    A student of one guidance gets an input for it that changes nothing, so that the pipeline does not guide it again.
    """
    codec: Any = denoiser.codec
    if codec is None:
        raise UserError("a UNet2DConditionModel is stored with its autoencoder and text encoder: give Denoiser(codec=)")
    network: Any = denoiser.network
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    config |= {"_class_name": "UNet2DConditionModel"}
    if denoiser.guidance is not None and config["time_cond_proj_dim"] is None:
        channels = config["block_out_channels"][0]
        config |= {"time_cond_proj_dim": GUIDANCE_FEATURES, GUIDANCE_IGNORED: True}
        weights = weights | {COND_PROJ: torch.zeros(channels, GUIDANCE_FEATURES)}
    (directory / "unet").mkdir()
    save_weights(weights, directory / UNET_WEIGHTS, metadata)
    write_json(directory / "unet" / "config.json", config)
    _scheduler(denoiser).save_pretrained(directory / "scheduler")
    theirs = _json(codec.folder / "model_index.json")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "requires_safety_checker": bool(theirs.get("requires_safety_checker", False)),
    }
    for name in LINKED:
        there = (codec.folder / name).is_dir()
        index[name] = CLASSES[name] if there else [None, None]
        if there:
            _link(codec.folder / name, directory / name)
    write_json(directory / "model_index.json", index)
    prompts = codec.prompts[:: max(1, -(-len(codec.prompts) // MOST_PROMPTS))]
    write_json(directory / PROMPTS, prompts)


def read(directory: Path) -> "diffusers.UNet2DConditionModel":
    """The network of a directory that `write` wrote."""
    config, weights = _read(directory / "unet"), tensors_of(directory / UNET_WEIGHTS)
    if config.pop(GUIDANCE_IGNORED, False):
        config |= WITHOUT_GUIDANCE
        del weights[COND_PROJ]
    claims.check_layers(config)
    network: Any = claims.fitted(lambda: diffusers.UNet2DConditionModel.from_config(config), weights)  # type: ignore[arg-type,return-value]
    return network


def _scheduler(denoiser: "Denoiser") -> "diffusers.DPMSolverMultistepScheduler":
    """DDIM without clipping, at the timesteps round(T i / N) - 1."""
    schedule = denoiser.schedule
    kind: Any = PREDICTION_TYPES.get(type(denoiser.parameterization))  # type: ignore[call-overload]
    if not isinstance(schedule, BetaSchedule) or kind is None:
        raise UserError("a UNet2DConditionModel is stored with a schedule of betas, predicting eps, x or v")
    return diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=len(schedule.alphas_cumprod),
        trained_betas=betas(schedule, len(schedule.alphas_cumprod)),
        prediction_type=kind,
        solver_order=1,
        algorithm_type="dpmsolver++",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        thresholding=False,
        steps_offset=1,  # what StableDiffusionPipeline wants to see; trailing has no offset
    )


def check_packages() -> Any:
    """The package that text encoders are of, quietly. Raises UserError where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("text to image needs the package transformers: pip install 'pdistill[text]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _link(source: Path, target: Path) -> None:
    """The files of a folder, linked where both lie on one disk, else copied."""
    target.mkdir()
    for file in _files(source):
        try:
            os.link(file.resolve(), target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)


def _files(component: Path) -> list[Path]:
    """The files of a component, but for further copies of its weights in other formats and precisions."""
    files = [file for file in sorted(component.iterdir()) if file.is_file()]
    if not any(file.suffix == ".safetensors" and ".fp16" not in file.name for file in files):
        return files
    return [file for file in files if file.suffix not in COPIES and ".fp16" not in file.name]


def _read(component: Path) -> dict[str, Any]:
    """The configuration of a component."""
    return _json(component / "config.json")


def _json(file: Path) -> dict[str, Any]:
    content = read_json(file, {}, cure="copy the folder again")
    return content if isinstance(content, dict) else {}
