"""Other people's diffusers models as Denoisers: any UNet2DModel with a scheduler of discrete betas or of flow matching.

Read by the classes of the components, not of the pipeline: `unet/` and `scheduler/`, or the flat layout of the oldest
models. What cannot be read is refused by name; nothing is unpickled but by torch's weights_only loading, and no remote
code runs.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from torch import nn

from pdistill.denoiser import Denoiser
from pdistill.errors import UserError, first_line
from pdistill.parameterization import Eps, Flow, Parameterization, V, X
from pdistill.schedule import BetaSchedule, FlowSchedule, Schedule

PREDICTIONS = {"epsilon": Eps, "sample": X, "v_prediction": V}
SUPPORTED = (
    "a UNet2DModel (unconditional or with class labels) with a scheduler of betas (DDPM, DDIM, PNDM, DPM-Solver, "
    "UniPC, DEIS, Euler, Heun, ...) or FlowMatchEulerDiscreteScheduler"
)


def load_diffusers_teacher(path: str | Path, revision: str | None = None, null_label: int | None = None) -> Denoiser:
    """The continuous-time denoiser of a diffusers folder, or of a model on the hub, in eval mode, float32.

    It keeps its own noise schedule and the timesteps that it was trained with. `null_label` is the class that stands
    for none, where it was trained so. Learned variances are dropped. Raises UserError for what is missing, damaged or
    not supported.
    """
    folder = _folder(str(path), revision)
    unet, scheduler = (
        _component(folder, "unet", "config.json"),
        _component(folder, "scheduler", "scheduler_config.json"),
    )
    config = _read(unet / "config.json")
    kept = _read(scheduler / "scheduler_config.json")
    _refuse_unsupported(folder, config, kept)
    network = _network(folder, unet, config)
    schedule, parameterization = _schedule(folder, scheduler, kept)
    _drop_learned_variance(folder, network, kept)
    terminal = schedule(torch.ones(1, dtype=torch.float64))
    if isinstance(parameterization, Eps) and terminal == -torch.inf:
        raise UserError(
            f"{path} predicts epsilon and ends at exactly zero SNR, where x_hat = (z - sigma eps) / alpha divides by "
            f"zero: give a v_prediction or sample model, or a scheduler without rescale_betas_zero_snr"
        )
    lineage: list[str | int] = [f"diffusers:{Path(path).name}"]
    return Denoiser(network, parameterization, schedule, lineage=lineage, null_label=null_label).eval()


def _folder(path: str, revision: str | None) -> Path:
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    if path.endswith((".pkl", ".ckpt", ".pt", ".pth")):
        raise UserError(
            f"{path} is a pickled file, which can run code when it is loaded: convert it to a diffusers folder first "
            f"(UNet2DModel.save_pretrained). Supported: {SUPPORTED}"
        )
    wanted = ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors", "*.bin", "*/*.bin"]
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's own, of many kinds
        raise UserError(
            f"{path} is no folder here, and the hub does not give it ({type(error).__name__}: {first_line(error)}): go "
            f"online, or give a folder that holds model_index.json, unet/config.json with its .safetensors and "
            f"scheduler/scheduler_config.json"
        ) from error


def _component(folder: Path, name: str, config: str) -> Path:
    """Its own folder, or the root of the flat layout."""
    for place in (folder / name, folder):
        if (place / config).exists():
            return place
    raise UserError(
        f"{folder} holds no {name}/{config} and no {config}: expected a diffusers folder. Supported: {SUPPORTED}"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): copy the folder again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: expected a JSON object; copy the folder again")
    return content


def _refuse_unsupported(folder: Path, config: dict[str, Any], scheduler: dict[str, Any]) -> None:
    unet, kind = config.get("_class_name"), str(scheduler.get("_class_name"))
    reason = None
    if "_module" in config or "_module" in scheduler or "auto_map" in config:
        reason = f"it needs remote code ({config.get('_module') or scheduler.get('_module') or 'auto_map'}), never run"
    elif unet != "UNet2DModel":
        reason = f"its network is a {unet}"
    elif config.get("time_embedding_type", "positional") != "positional":
        reason = f"its time embedding is {config['time_embedding_type']!r}, whose output depends on the time"
    elif not hasattr(diffusers, kind):
        reason = f"its scheduler {kind} is not one of this diffusers"
    elif kind in ("ScoreSdeVeScheduler", "KarrasVeScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        reason = f"its scheduler {kind} has no betas (variance exploding)"
    elif scheduler.get("thresholding"):
        reason = "its scheduler thresholds dynamically, which DDIM in closed form cannot"
    if reason:
        raise UserError(f"{folder} cannot be a teacher: {reason}. Supported: {SUPPORTED}")


def _network(folder: Path, unet: Path, config: dict[str, Any]) -> UNet2DModel:
    """By `from_pretrained`, which alone renames old attention keys; fp16 files are read where there are no others."""
    names = [p.name for p in unet.iterdir()]
    plain = any(n in names for n in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"))
    plain = plain or any(n.endswith(".index.json") and "fp16" not in n for n in names)
    half = any(".fp16." in n for n in names)
    if not plain and not half:
        raise UserError(f"{unet} holds no diffusion_pytorch_model.safetensors or .bin: copy the folder again")
    diffusers.utils.logging.disable_progress_bar()
    try:
        network: UNet2DModel = UNet2DModel.from_pretrained(
            str(unet), variant=None if plain else "fp16", torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    except Exception as error:  # diffusers', safetensors' and torch's own
        raise UserError(f"diffusers cannot load {unet} ({type(error).__name__}: {first_line(error)})") from error
    if network.config["in_channels"] > network.config["out_channels"]:
        raise UserError(f"{folder} takes {network.config['in_channels']} channels and gives fewer: not an image model")
    return network


def _schedule(folder: Path, scheduler: Path, config: dict[str, Any]) -> tuple[Schedule, Parameterization]:
    kind = config["_class_name"]
    try:
        loaded = getattr(diffusers, kind).from_pretrained(str(scheduler))
    except Exception as error:
        raise UserError(f"diffusers cannot load {scheduler} ({type(error).__name__}: {first_line(error)})") from error
    steps = int(loaded.config["num_train_timesteps"])
    if kind == "FlowMatchEulerDiscreteScheduler":
        if loaded.config.get("use_dynamic_shifting"):
            raise UserError(f"{folder} shifts its times by resolution (use_dynamic_shifting): give a fixed shift")
        return FlowSchedule(shift=float(loaded.config["shift"]), train_timesteps=steps), Flow()
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or not hasattr(loaded, "alphas_cumprod"):
        raise UserError(f"{folder} has a {kind} with prediction_type {prediction!r}: supported are {SUPPORTED}")
    return BetaSchedule(tuple(loaded.alphas_cumprod.double().tolist())), PREDICTIONS[prediction]()


def _drop_learned_variance(folder: Path, network: UNet2DModel, scheduler: dict[str, Any]) -> None:
    """The first half of the output channels is the prediction; the second, the variance, matters to no DDIM."""
    channels, out = network.config["in_channels"], network.config["out_channels"]
    if out == channels:
        return
    if out != 2 * channels or scheduler.get("variance_type") not in ("learned", "learned_range"):
        raise UserError(f"{folder} gives {out} channels for {channels}: neither a prediction nor one with its variance")
    with torch.no_grad():
        conv = nn.Conv2d(network.conv_out.in_channels, channels, 3, padding=1)
        conv.weight.copy_(network.conv_out.weight[:channels])
        conv.bias.copy_(network.conv_out.bias[:channels])  # type: ignore[union-attr,arg-type]
    network.conv_out = conv
    network.register_to_config(out_channels=channels)
    print(f"{folder}: the learned variance ({out - channels} of {out} output channels) is dropped, DDIM needs none")
