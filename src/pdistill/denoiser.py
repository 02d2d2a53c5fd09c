"""The thing that flows: a network together with what its output means.

A Denoiser on disk is a directory laid out as a diffusers pipeline (`model_index.json`, `unet/`,
`scheduler/`) plus `denoiser.json`. `DiffusionPipeline.from_pretrained(directory)` samples from it with
diffusers alone; `Denoiser.load(directory)` gives the continuous-time network from the same weights.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pdistill.errors import UserError
from pdistill.parameterization import BY_NAME, Parameterization, broadcast
from pdistill.schedule import CosineSchedule, alpha_sigma, betas, logsnr_on_grid

FORMAT = 1
DEFAULT_GRID = 1024  # steps that a teacher's diffusers pipeline is written for
PREDICTION_TYPES = {"v": "v_prediction", "x": "sample", "eps": "epsilon"}  # diffusers has no word for x_eps


def timestep_of(logsnr: Tensor) -> Tensor:
    """What the network sees of time: 1000 atan(exp(-logsnr / 2)) / (pi / 2), in [0, 1000]."""
    return 1000 * torch.atan(torch.exp(-0.5 * logsnr)) / (0.5 * math.pi)


class Denoiser(nn.Module):
    """`denoiser(z, t, label=None) -> x_hat`: images (B, C, H, W) at times t (B,) to denoised images.

    `num_steps` is the step count it was distilled for (None for a teacher); `lineage` lists the step counts
    of its ancestors, e.g. ["teacher", 16, 8]. `null_label` is the label that stands for none, where the network
    was trained with label dropout: its last.
    """

    def __init__(
        self,
        network: nn.Module,
        parameterization: Parameterization,
        schedule: CosineSchedule,
        num_steps: int | None = None,
        lineage: list[str | int] | None = None,
        null_label: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.parameterization = parameterization
        self.schedule = schedule
        self.num_steps = num_steps
        self.lineage = lineage or ["teacher"]
        self.null_label = null_label

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        logsnr = self.schedule(t)
        output = self.network(z, timestep_of(logsnr), class_labels=label).sample.to(z.dtype)
        alpha, sigma = alpha_sigma(logsnr)
        return self.parameterization.to_x(output, z, broadcast(alpha, z), broadcast(sigma, z))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        config = self.network.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def num_classes(self) -> int | None:
        """How many classes it knows; None if it is unconditional."""
        return self.network.config.num_class_embeds if self.null_label is None else self.null_label

    @property
    def architecture(self) -> dict:
        """What must be equal for two denoisers' weights and outputs to mean the same."""
        network = {k: v for k, v in self.network.config.items() if not k.startswith("_") and k != "dropout"}
        network = {k: list(v) if isinstance(v, tuple) else v for k, v in network.items()}
        return {
            "parameterization": self.parameterization.name,
            "schedule": vars(self.schedule),
            "null_label": self.null_label,
            "network": network,
        }

    def save(self, directory: str | Path, grid: int | None = None) -> None:
        """Writes the directory whole or not at all, replacing one that stands there.

        `grid` is the step count of the diffusers pipeline; by default `num_steps`, or 1024 for a teacher. An
        x_eps or class-conditional denoiser gets no `model_index.json`: no diffusers pipeline of images alone
        knows that output, or passes labels.
        """
        directory = Path(directory)
        grid = grid or self.num_steps or DEFAULT_GRID
        temporary = directory.with_name(directory.name + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "unet").mkdir(parents=True)
        timesteps = timestep_of(logsnr_on_grid(self.schedule, torch.arange(1, grid + 1, dtype=torch.float64), grid))
        weights = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        weights["time_proj.weight"] = self.network.time_proj(timesteps.float().to(self.network.device)).cpu()
        save_file(weights, temporary / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        unet_config = {k: v for k, v in self.network.config.items() if not k.startswith("_")}
        unet_config |= {
            "_class_name": "UNet2DModel",
            "time_embedding_type": "learned",
            "num_train_timesteps": grid,
        }
        write_json(temporary / "unet" / "config.json", unet_config)
        if self.parameterization.name in PREDICTION_TYPES and self.num_classes is None:
            self._scheduler(grid).save_pretrained(temporary / "scheduler")
            index = {
                "_class_name": "DDPMPipeline",
                "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
                "unet": ["diffusers", "UNet2DModel"],
            }
            write_json(temporary / "model_index.json", index)
        description = {
            "format": FORMAT,
            "parameterization": self.parameterization.name,
            "schedule": {"name": "cosine"} | {k: str(v) for k, v in vars(self.schedule).items()},
            "num_steps": self.num_steps,
            "lineage": self.lineage,
            "null_label": self.null_label,
            "pipeline_steps": grid,
        }
        write_json(temporary / "denoiser.json", description)
        replaced = directory.with_name(directory.name + ".replaced")
        if directory.exists():
            directory.rename(replaced)
        temporary.rename(directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _scheduler(self, num_steps: int) -> DPMSolverMultistepScheduler:
        """diffusers' first-order DPM-Solver++ on our grid: clipped DDIM with eps recomputed."""
        return DPMSolverMultistepScheduler(
            num_train_timesteps=num_steps,
            trained_betas=betas(self.schedule, num_steps),
            prediction_type=PREDICTION_TYPES[self.parameterization.name],
            solver_order=1,
            algorithm_type="dpmsolver++",
            timestep_spacing="trailing",
            final_sigmas_type="zero",
            thresholding=True,
            sample_max_value=1.0,
        )

    @classmethod
    def load(cls, directory: str | Path) -> "Denoiser":
        """The continuous-time denoiser of a directory that `save` wrote, on the CPU, in eval mode.

        Raises UserError for a directory that is missing, foreign or damaged.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"no denoiser at {directory}: expected a directory that holds denoiser.json and unet/")
        try:
            description = json.loads((directory / "denoiser.json").read_text())
            unet_config = json.loads((directory / "unet" / "config.json").read_text())
            weights = load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")
            if description["format"] != FORMAT:
                raise UserError(f"{directory} has format {description['format']}; this version reads format {FORMAT}")
            schedule = {k: float(v) for k, v in description["schedule"].items() if k != "name"}
            unet_config |= {"time_embedding_type": "positional", "num_train_timesteps": None}
            del weights["time_proj.weight"]
            network = UNet2DModel.from_config(unet_config)
            network.load_state_dict(weights)
            parameterization = BY_NAME[description["parameterization"]]()
            denoiser = cls(
                network,
                parameterization,
                CosineSchedule(**schedule),
                description["num_steps"],
                description["lineage"],
                description.get("null_label"),
            )
        except FileNotFoundError as error:
            raise UserError(
                f"{directory} is not a denoiser directory: {error.filename} is missing. "
                f"Expected what `Denoiser.save` writes, e.g. outputs/<name>/teacher/denoiser"
            ) from error
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{directory} is damaged or was written by another program ({type(error).__name__}: {reason}). "
                f"Copy or train it again"
            ) from error
        return denoiser.eval()


def write_json(path: Path, content: object) -> None:
    """JSON under a temporary name first, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)
