"""diffusers' own unconditional pipelines, so that a model of someone else's can be measured like ours."""

import json
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from pdistill.errors import UserError
from pdistill.randomness import generator


def is_pipeline(path: Path) -> bool:
    """A directory that diffusers wrote, and we did not."""
    return (path / "model_index.json").exists() and not (path / "denoiser.json").exists()


class Pipeline:
    """An unconditional pipeline (DDPMPipeline, DDIMPipeline, ...) sampled by its own scheduler."""

    def __init__(self, pipeline: diffusers.DiffusionPipeline) -> None:
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, path: str) -> "Pipeline":
        """Raises UserError for a directory that is damaged, and for pipelines that need more than noise."""
        diffusers.utils.logging.disable_progress_bar()
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(path, low_cpu_mem_usage=False)
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise UserError(f"diffusers cannot load the pipeline {path} ({str(error).splitlines()[0]})") from error
        if not isinstance(getattr(pipeline, "unet", None), diffusers.UNet2DModel):
            raise UserError(
                f"{path} is a {type(pipeline).__name__}: only unconditional pipelines of a UNet2DModel are measured, "
                f"e.g. DDPMPipeline or DDIMPipeline"
            )
        return cls(pipeline)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        config = self.pipeline.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def to(self, device: torch.device) -> None:
        self.pipeline.to(device)

    def generate(
        self, indices: range, num_steps: int, seed: int, batch_size: int, device: torch.device | str
    ) -> Iterator[Tensor]:
        """Batches (B, C, H, W) in [-1, 1], image i from a generator that depends on (seed, i) alone."""
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            images = self.pipeline(
                len(batch),
                generator=[generator(seed, i) for i in batch],
                num_inference_steps=num_steps,
                output_type="np",
            ).images
            yield torch.from_numpy(images).movedim(-1, 1).to(device) * 2 - 1
