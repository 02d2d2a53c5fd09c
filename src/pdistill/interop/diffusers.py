"""Other people's diffusers pipelines, measured like ours."""

import copy
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from torch import Tensor

from pdistill import claims
from pdistill.bars import bar
from pdistill.checks import is_count
from pdistill.errors import UserError, first_line
from pdistill.generation import Draw
from pdistill.network import digest_of_weights, image_shape_of
from pdistill.randomness import generator
from pdistill.reading import json_of, text_of


def is_pipeline(path: Path) -> bool:
    """A directory that diffusers wrote, and we did not."""
    return (path / "model_index.json").exists() and not (path / "denoiser.json").exists()


def _check_files(folder: Path) -> None:
    """Raises ValueError for a pipeline that names code, or claims more than its files hold, before anything is made.

    diffusers would import modules that model_index.json names, some versions also Python files in the folder.
    """
    index = json_of(text_of(folder / "model_index.json"))
    kinds = {key: value for key, value in index.items() if not key.startswith("_") and isinstance(value, list)}
    named = [index.get("_class_name"), *(word for kind in kinds.values() for word in kind[1:] if word is not None)]
    if not all(isinstance(word, str) for word in named) or any(kind[:1] not in OF_DIFFUSERS for kind in kinds.values()):
        raise ValueError("model_index.json names other code than diffusers' own, which never runs")
    config, unet = json_of(text_of(folder / "unet" / "config.json")), folder / "unet"
    if "auto_map" in config or config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"its network is a {config.get('_class_name')}, no UNet2DModel of diffusers")
    claims.check_layers(config)
    files = [file for file in unet.iterdir() if file.suffix in (".safetensors", ".bin")]
    network: Any = UNet2DModel
    claims.check_bytes(lambda: network.from_config(config), files)
    size = config.get("sample_size")
    claims.check_shape((1, *(size if isinstance(size, list) else (size, size))))
    scheduler = json_of(text_of(folder / "scheduler" / "scheduler_config.json"))
    if not is_count(scheduler.get("num_train_timesteps", 1000)):
        raise ValueError(f"num_train_timesteps is {scheduler['num_train_timesteps']!r:.50}")


def _steps(timesteps: Any = None, total: int | None = None) -> Any:
    """What pipelines show their steps with: it moves the bar of batches on."""
    return bar(() if timesteps is None else timesteps, "sampling by the pipeline", total, "step", within=True)


OF_DIFFUSERS = (["diffusers"], [None], [])  # whose a component of model_index.json is


class Pipeline:
    """An unconditional pipeline (DDPMPipeline, DDIMPipeline, ...) sampled by its own scheduler."""

    def __init__(self, pipeline: Any, path: str) -> None:
        """Of a diffusers pipeline; `path` is what errors call it."""
        self.pipeline, self.path = pipeline, path
        pipeline.progress_bar = _steps

    @classmethod
    def load(cls, path: str | Path) -> "Pipeline":
        """Raises UserError for a directory that is damaged, and for pipelines that need more than noise."""
        diffusers.utils.logging.disable_progress_bar()
        try:
            _check_files(Path(path))
            pipeline = diffusers.DiffusionPipeline.from_pretrained(str(path), low_cpu_mem_usage=False)
        except Exception as error:  # of other people's files: whatever diffusers, safetensors and torch raise
            raise UserError(
                f"diffusers cannot load the pipeline {path} ({type(error).__name__}: {first_line(error)})"
            ) from error
        network = getattr(pipeline, "unet", None)
        if not isinstance(network, UNet2DModel) or network.config["num_class_embeds"] is not None:
            raise UserError(
                f"{path} is a {type(pipeline).__name__}: only unconditional pipelines of a UNet2DModel are measured, "
                f"e.g. DDPMPipeline or DDIMPipeline"
            )
        if not all(value.isfinite().all() for value in network.state_dict().values()):
            raise UserError(f"{path} holds weights that are not finite (NaN or infinite): fetch or train it again")
        return cls(pipeline, str(path))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return image_shape_of(self.pipeline.unet)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """The same: pipelines of latents are not measured."""
        return self.image_shape

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the weights and what the scheduler makes of them."""
        parts = (self.pipeline.unet, self.pipeline.scheduler)
        configs = [{k: v for k, v in part.config.items() if not k.startswith("_")} for part in parts]
        names = [type(part).__name__ for part in (self.pipeline, *parts)]
        about = json.dumps([names, configs], sort_keys=True, default=str)
        return digest_of_weights(self.pipeline.unet, about)

    @property
    def clip(self) -> bool:
        """Whether the scheduler clips its predictions of the image."""
        config = self.pipeline.scheduler.config
        return bool(config.get("clip_sample") or config.get("thresholding"))

    def to(self, device: torch.device | str) -> "Pipeline":
        self.pipeline.to(device)
        return self

    def check_steps(self, num_steps: int) -> None:
        """Raises UserError where its scheduler cannot take so many steps."""
        try:
            copy.deepcopy(self.pipeline.scheduler).set_timesteps(num_steps)
        except Exception as error:
            trained = self.pipeline.scheduler.config.get("num_train_timesteps")
            raise UserError(
                f"the pipeline {self.path} cannot take num_steps={num_steps} ({first_line(error)}): it was trained "
                f"with {trained} steps, give no more"
            ) from error

    def generate(self, indices: Sequence[int], draw: Draw, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Batches (B, C, H, W) in [-1, 1], image i from a generator that depends on (seed, i) alone.

        `draw.sampler` and `draw.clip` do not matter: the scheduler is its own. Raises UserError for whatever the
        pipeline raises, and for samples that are not finite.
        """
        for start in range(0, len(indices), draw.batch_size):
            batch = indices[start : start + draw.batch_size]
            try:
                images = self.pipeline(  # type: ignore[operator]
                    batch_size=len(batch),
                    generator=[generator("pipeline", draw.seed, i) for i in batch],
                    num_inference_steps=draw.num_steps,
                    output_type="np",
                ).images
                samples = torch.from_numpy(images).movedim(-1, 1).to(device) * 2 - 1  # (B, H, W, C) in [0, 1] before
            except Exception as error:  # other people's code
                raise UserError(
                    f"the pipeline {self.path} fails at {draw.num_steps} steps "
                    f"({type(error).__name__}: {first_line(error)})"
                ) from error
            if samples.shape[1:] != self.image_shape:
                raise UserError(
                    f"the pipeline {self.path} makes images of shape {tuple(samples.shape[1:])}, and its network says "
                    f"{self.image_shape}: only pipelines whose network makes the pixels are measured"
                )
            if not samples.isfinite().all():
                raise UserError(f"samples of {self.path} at {draw.num_steps} steps are not finite (NaN or infinite)")
            yield samples
