"""Denoisers as folders that diffusers opens by itself: `unet/`, `scheduler/`, `model_index.json`, `pipeline.py`.

Three kinds, by what diffusers has words for:
- x, v and eps of a variance-preserving process, without labels: a plain DDPMPipeline. Its scheduler is first-order
  DPM-Solver++ with thresholding at 1, which is clipped DDIM with eps recomputed. The network gets a step's index, and
  has a learned embedding whose rows are the sinusoidal embeddings of the timesteps.
- the velocity of flow matching, without labels: a plain DDPMPipeline with FlowMatchEulerDiscreteScheduler, which never
  clips. It gives the network a step's number as a float, which no learned embedding takes. So the network gets
  sinusoids of other frequencies, and its first linear layer weights that give on every number what its own give on the
  timestep: exact, as long as there are fewer numbers than sinusoids. Its own lie in `continuous_time.safetensors`.
- everything else: `pipeline.py`, which runs with `trust_remote_code=True`.

All of them hold `pipeline.py`, which knows the step count that is right, and clips on demand.
"""

import inspect
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.models.embeddings import Timesteps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdistill.files import write_json
from pdistill.interop import pipeline as pipeline_file
from pdistill.registry import state_of
from pdistill.schedule import betas, flow_matching, logsnr_on_grid, variance_preserving

if TYPE_CHECKING:
    from pdistill.denoiser import Denoiser

PREDICTION_TYPES = {"v": "v_prediction", "x": "sample", "eps": "epsilon"}  # diffusers has no word for the others
KNOWN_TO_PIPELINE_FILE = ("x", "eps", "v", "flow", "x_eps", "edm")
UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
CONTINUOUS = "continuous_time.safetensors"
LINEAR = "time_embedding.linear_1.weight"
HIGHEST_FREQUENCY = 20.0  # of the sinusoids of numbers, so high that they tell neighbouring integers apart
LARGEST_RESIDUAL = 1e-5  # of the fit, relative to the largest value
LEAST_GRID = 1000  # steps of a teacher's folder, at least: DDPMPipeline's default


def write(denoiser: "Denoiser", weights: dict[str, Tensor], grid: int, directory: Path) -> int:
    """Writes the folder for `grid` steps, or for a multiple of them where the denoiser has no step count of its own.

    Returns how many. A network's `weights` are given on the CPU. There is no `model_index.json` where no pipeline knows
    the parameterization.
    """
    if denoiser.num_steps is None:
        grid *= -(-LEAST_GRID // grid)
    network: Any = denoiser.network
    timesteps = denoiser.schedule.timestep(torch.arange(1, grid + 1, dtype=torch.float64) / grid)
    config = {k: v for k, v in network.config.items() if not k.startswith("_")} | {"_class_name": "UNet2DModel"}
    index: dict[str, Any] = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    name = getattr(denoiser.parameterization, "name", None)
    fitted = None
    scheduler: Any = None
    if denoiser.num_classes is None and name in PREDICTION_TYPES and _process_is(denoiser, variance_preserving):
        scheduler = _scheduler(denoiser, grid)
        weights = weights | {"time_proj.weight": network.time_proj(timesteps.float().to(network.device)).cpu()}
        config |= {"time_embedding_type": "learned", "num_train_timesteps": grid}
    elif denoiser.num_classes is None and name == "flow" and _is_linear_flow(denoiser, grid):
        fitted = _fitted(network, weights[LINEAR], torch.arange(1, grid + 1), timesteps)
        scheduler = None if fitted is None else FlowMatchEulerDiscreteScheduler(num_train_timesteps=grid)
    if fitted is not None:
        own = {k: str(int(config[k])) for k in ("freq_shift", "flip_sin_to_cos")}
        own["freq_shift"] = repr(config["freq_shift"])
        save_file({LINEAR: weights[LINEAR]}, directory / CONTINUOUS, metadata={"format": "pt"} | own)
        weights = weights | {LINEAR: fitted}
        config |= {"freq_shift": _freq_shift(network), "flip_sin_to_cos": True}
    if scheduler is not None:
        scheduler.save_pretrained(directory / "scheduler")
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
    elif name in KNOWN_TO_PIPELINE_FILE:
        index = index | _for_pipeline_file(denoiser, timesteps, grid)
    (directory / "unet").mkdir()
    save_file(weights, directory / "unet" / UNET_WEIGHTS, metadata=_metadata(denoiser, grid))
    write_json(directory / "unet" / "config.json", config)
    if name in KNOWN_TO_PIPELINE_FILE:
        write_json(directory / "model_index.json", index)
        shutil.copyfile(inspect.getfile(pipeline_file), directory / "pipeline.py")
    return grid


def read(directory: Path) -> UNet2DModel:
    """The continuous-time network of a folder that `write` wrote, or an earlier version."""
    config = json.loads((directory / "unet" / "config.json").read_text())
    weights = load_file(directory / "unet" / UNET_WEIGHTS)
    if config.get("time_embedding_type") == "learned":
        del weights["time_proj.weight"]
        config |= {"time_embedding_type": "positional", "num_train_timesteps": None}
    elif (directory / CONTINUOUS).exists():
        weights |= load_file(directory / CONTINUOUS)
        with safe_open(directory / CONTINUOUS, "pt") as file:
            kept = file.metadata()
        shift = float(kept["freq_shift"])
        config |= {"freq_shift": int(shift) if shift.is_integer() else shift}
        config |= {"flip_sin_to_cos": kept["flip_sin_to_cos"] == "1"}
    network: Any = UNet2DModel.from_config(config)
    network.load_state_dict(weights)
    return network


def _metadata(denoiser: "Denoiser", grid: int) -> dict[str, str]:
    """Of the safetensors file, whose values are text: the step count, the times of the grid, the ancestors."""
    return {
        "format": "pt",
        "pdistill_num_steps": json.dumps(denoiser.num_steps),
        "pdistill_grid": json.dumps([i / grid for i in range(1, grid + 1)]),
        "pdistill_lineage": json.dumps(denoiser.lineage),
    }


def _process_is(denoiser: "Denoiser", process: Any) -> bool:
    logsnr = torch.linspace(-5, 5, 11, dtype=torch.float64)
    return all(
        torch.allclose(*pair) for pair in zip(denoiser.schedule.alpha_sigma(logsnr), process(logsnr), strict=True)
    )


def _is_linear_flow(denoiser: "Denoiser", grid: int) -> bool:
    """Whether sigma = i/N on the grid: FlowMatchEulerDiscreteScheduler shifts twice where there is a shift."""
    i = torch.arange(1, grid + 1, dtype=torch.float64)
    _, sigma = denoiser.schedule.alpha_sigma(logsnr_on_grid(denoiser.schedule, i, grid))
    return _process_is(denoiser, flow_matching) and torch.allclose(sigma, i / grid, atol=1e-4, rtol=0)


def _freq_shift(network: UNet2DModel) -> float:
    """The `freq_shift` by which diffusers' frequencies, 10000^(-j / (half - freq_shift)), rise from 1 to 20."""
    half = network.config["block_out_channels"][0] // 2
    return half * (1 + math.log(10000) / math.log(HIGHEST_FREQUENCY))


def _fitted(network: UNet2DModel, linear: Tensor, indices: Tensor, timesteps: Tensor) -> Tensor | None:
    """Weights that give on sinusoids of `indices` what `linear` gives on those of `timesteps`, if there are such."""
    channels = network.config["block_out_channels"][0]
    if len(indices) > channels:
        return None
    of_indices = Timesteps(channels, True, _freq_shift(network))(indices.float()).double()  # type: ignore[arg-type]
    wanted = network.time_proj(timesteps.float().to(network.device)).cpu().double() @ linear.double().T
    found = torch.linalg.lstsq(of_indices, wanted, driver="gelsd").solution.T.float().contiguous()
    residual = (of_indices.float() @ found.T - wanted.float()).abs().max()
    return found if residual <= LARGEST_RESIDUAL * wanted.abs().max() else None


def _scheduler(denoiser: "Denoiser", num_steps: int) -> DPMSolverMultistepScheduler:
    """diffusers' first-order DPM-Solver++ on our grid: clipped DDIM with eps recomputed."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=num_steps,
        trained_betas=betas(denoiser.schedule, num_steps),
        prediction_type=PREDICTION_TYPES[denoiser.parameterization.name],  # type: ignore[arg-type]
        solver_order=1,
        algorithm_type="dpmsolver++",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        thresholding=True,
        sample_max_value=1.0,
    )


def _for_pipeline_file(denoiser: "Denoiser", timesteps: Tensor, grid: int) -> dict[str, Any]:
    """What pipeline.py is made with."""
    i = torch.arange(1, grid + 1, dtype=torch.float64)
    alpha, sigma = denoiser.schedule.alpha_sigma(logsnr_on_grid(denoiser.schedule, i, grid))
    return {
        "_class_name": ["pipeline", "FewStepPipeline"],
        "prediction": denoiser.parameterization.name,
        "sigma_data": float(state_of(denoiser.parameterization).get("sigma_data", 1.0)),
        "timesteps": timesteps.tolist(),
        "alphas": alpha.tolist(),
        "sigmas": sigma.tolist(),
        "noise_scale": float(getattr(denoiser.schedule, "noise_scale", 1.0)),
        "num_steps": denoiser.num_steps,
        "num_classes": denoiser.num_classes,
        "null_label": denoiser.null_label,
    }
