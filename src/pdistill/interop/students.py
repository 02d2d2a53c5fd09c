"""Our directories of a UNet2DModel, which diffusers opens and samples as `pdistill.sample` does.

    v, x, eps, variance preserving   DDPMPipeline with first-order DPM-Solver++, which is clipped DDIM
    flow, straight paths, students   DDPMPipeline with FlowMatchEuler, which does not clip; `pipeline.py` beside it does
    every other kind, classes, the   the pipeline of `pipeline.py`, copied into the folder, by trust_remote_code=True
    stochastic sampler

The continuous-time network is got back bit for bit: `unet/config.json` keeps what was changed, under a private key that
diffusers passes over, and `time_embedding.safetensors` the weight that was.
"""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers.models.embeddings import Timesteps
from safetensors.torch import save_file
from torch import Tensor

from pdistill import claims, guided
from pdistill.files import write_json
from pdistill.guided import GuidedUNet2DModel
from pdistill.heads import Heads, blocks
from pdistill.parameterization import Edm, Eps, Flow, V, X, XEps
from pdistill.reading import json_of, tensors_of, text_of
from pdistill.sampling import DDIM, STOCHASTIC
from pdistill.schedule import variance_preserving
from pdistill.unets import UNet2DModel

if TYPE_CHECKING:
    from pdistill.denoiser import Denoiser

PREDICTION_TYPES = {V: "v_prediction", X: "sample", Eps: "epsilon"}  # diffusers has no word for the others
BY_OUR_PIPELINE = (Eps, X, XEps, V, Flow, Edm)  # and Heads of one of these
PIPELINE = Path(__file__).with_name("pipeline.py")
GUIDED = Path(guided.__file__)
DEFAULT_STEPS = 1000  # of DDPMPipeline, where its caller gives none
REFINED = 3
UNET_WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
TIME_EMBEDDING, ITS_WEIGHT = Path("time_embedding.safetensors"), "time_embedding.linear_1.weight"
CONTINUOUS = "_continuous_time"  # in unet/config.json: the keys of the continuous-time network that differ
EARLIER = {"time_embedding_type": "positional", "num_train_timesteps": None}  # what it says where it says nothing
LOWEST_LOGSNR = -40.0  # of the betas: alpha = 2e-9, where the schedule says 0


def write_unet(
    denoiser: "Denoiser", weights: dict[str, Tensor], grid: int, metadata: dict[str, str], directory: Path
) -> None:
    """`unet/` and what diffusers opens it by, for `grid` steps; `metadata` goes into the weights' file.

    No `model_index.json` is written where the parameterization, or the sampler, is not one of ours.
    """
    network: Any = denoiser.network
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    kind = type(denoiser.parameterization)
    alone = denoiser.num_classes is None and config["time_embedding_type"] == "positional" and denoiser.sampler == DDIM
    refit = None
    if kind is Flow and alone and denoiser.num_steps is not None and _is_straight(denoiser):
        refit = _refit(denoiser, grid)
    (directory / "unet").mkdir()
    if kind in PREDICTION_TYPES and alone and _is_variance_preserving(denoiser):
        rows, changes, scheduler = _learned(denoiser, grid)
        weights = weights | {"time_proj.weight": rows}
        _write_index(directory, scheduler)
    elif refit is not None:
        save_file({ITS_WEIGHT: weights[ITS_WEIGHT]}, directory / TIME_EMBEDDING, metadata={"format": "pt"})
        weight, changes = refit
        weights = weights | {ITS_WEIGHT: weight}
        shutil.copyfile(PIPELINE, directory / PIPELINE.name)
        _write_index(directory, diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=grid))
    else:
        changes = {}
        inner = type(getattr(denoiser.parameterization, "inner", denoiser.parameterization))
        if inner in BY_OUR_PIPELINE and denoiser.sampler in (DDIM, STOCHASTIC):
            shutil.copyfile(PIPELINE, directory / PIPELINE.name)
            if isinstance(network, GuidedUNet2DModel):
                shutil.copyfile(GUIDED, directory / "unet" / GUIDED.name)
            write_json(directory / "model_index.json", _index_of_ours(denoiser, grid))
    save_weights(weights, directory / UNET_WEIGHTS, metadata)
    kept = {CONTINUOUS: {key: config[key] for key in changes}}
    write_json(directory / "unet" / "config.json", config | {"_class_name": type(network).__name__} | kept | changes)


def save_weights(weights: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file, the same bytes each time: the library writes the keys of its metadata in a random order."""
    save_file(weights, path, metadata={"format": "pt"} | metadata)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} | header
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"the header of {path} is {size} bytes long, and {len(text)} in order")
        file.seek(8)
        file.write(text.ljust(size))


def read_unet(directory: Path) -> UNet2DModel:
    """The continuous-time network of a directory that `write_unet`, of this version or an earlier one, wrote."""
    config = json_of(text_of(directory / "unet" / "config.json"))
    weights = tensors_of(directory / UNET_WEIGHTS)
    changed = config.pop(CONTINUOUS, EARLIER)
    if "time_embedding_type" in changed:
        del weights["time_proj.weight"]
    if "freq_shift" in changed:
        weights |= tensors_of(directory / TIME_EMBEDDING)
    kind: Any = GuidedUNet2DModel if config.get("_class_name") == GuidedUNet2DModel.__name__ else UNet2DModel
    claims.check_layers(config | changed)
    network: Any = claims.fitted(lambda: kind.from_config(config | changed), weights)
    return network


def _write_index(directory: Path, scheduler: Any) -> None:
    """A DDPMPipeline of `scheduler`: it keeps the scheduler that it is given, where others replace it."""
    scheduler.save_pretrained(directory / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", "UNet2DModel"],
    }
    write_json(directory / "model_index.json", index)


def _is_variance_preserving(denoiser: "Denoiser") -> bool:
    logsnr = torch.linspace(-5, 5, 11, dtype=torch.float64)
    processes = zip(denoiser.schedule.alpha_sigma(logsnr), variance_preserving(logsnr), strict=True)
    return all(torch.allclose(*pair) for pair in processes)


def _learned(denoiser: "Denoiser", grid: int) -> "tuple[Tensor, dict[str, Any], diffusers.DPMSolverMultistepScheduler]":
    """The rows of a learned embedding of time, the configuration's changes, and clipped DDIM with eps recomputed.

    diffusers sees a teacher's grid as it is. Of a student it sees a grid that is at least REFINED times as fine as its
    caller may ask for: its integer times k fall on the student's t = i/N at the end of each interval and stand still
    between. Steps between equal times change nothing: whoever gives no step count gets the student's images, though at
    1000 evaluations.
    """
    network: Any = denoiser.network
    refined = 1 if denoiser.num_steps is None else -(-REFINED * DEFAULT_STEPS // grid)
    while len(np.arange(grid * refined, 0, -grid * refined / DEFAULT_STEPS)) > DEFAULT_STEPS:  # by rounding, as there
        refined += 1
    k = torch.arange(grid * refined, dtype=torch.float64)
    ahead = min(REFINED, refined)  # the last betas before t = i/N, which reach its log-SNR together: see `_betas`
    t = ((k + ahead) / refined).floor().clamp(min=1) / grid
    rows = network.time_proj(denoiser.schedule.timestep(t).float().to(network.device)).cpu()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=len(t),
        trained_betas=_betas(denoiser.schedule(t)),
        prediction_type=PREDICTION_TYPES[type(denoiser.parameterization)],  # type: ignore[arg-type]
        solver_order=1,
        algorithm_type="dpmsolver++",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        thresholding=True,
        sample_max_value=1.0,
    )
    return rows, {"time_embedding_type": "learned", "num_train_timesteps": len(t)}, scheduler


def _betas(logsnr: Tensor) -> list[float]:
    """float32 betas (T,) whose products of 1 - beta follow sigmoid(logsnr), logsnr (T,) falling or level.

    Each beta is rounded down, to 1 - 2^-24 at most (1 makes log(0)), and the next makes up for it: near pure noise one
    beta alone is too coarse.
    """
    betas: list[float] = []
    reached = 1.0
    for abar in torch.sigmoid(logsnr.clamp(min=LOWEST_LOGSNR)).tolist():
        exact = max(0.0, 1 - abar / reached)
        beta = np.float32(exact)
        beta = np.nextafter(beta, np.float32(0)) if float(beta) > exact or beta == 1 else beta
        betas.append(float(beta))
        reached *= 1 - betas[-1]
    return betas


def _is_straight(denoiser: "Denoiser") -> bool:
    """alpha = 1 - t and sigma = t."""
    t = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    alpha, sigma = denoiser.schedule.alpha_sigma(denoiser.schedule(t))
    return torch.allclose(sigma, t, atol=1e-6) and torch.allclose(alpha, 1 - t, atol=1e-6)


def _refit(denoiser: "Denoiser", grid: int) -> tuple[Tensor, dict[str, Any]] | None:
    """A first layer W' of the time embedding that sees k = 1, ..., grid and gives what W gives at t = k/grid.

    FlowMatchEuler's timesteps are floats, which no learned embedding takes. W' e'(k) = W e(timestep_k) has a solution
    where there are fewer k than features e', and a small one where the frequencies of e', 1 to `highest`, tell whole
    numbers apart (those above pi are the ones below it again). None where there is no good one.
    """
    network: Any = denoiser.network
    t = torch.arange(1, grid + 1, dtype=torch.float64) / grid
    channels, flip = network.config["block_out_channels"][0], network.config["flip_sin_to_cos"]
    timesteps = denoiser.schedule.timestep(t).float().to(network.device)
    weight = network.time_embedding.linear_1.weight.detach().double().cpu()
    wanted = network.time_proj(timesteps).double().cpu() @ weight.T
    half = channels // 2
    for highest in (2 * math.pi, 10.0):
        freq_shift = half + max(1, round((half - 1) * math.log(10_000) / math.log(highest)))
        features = Timesteps(channels, flip, freq_shift)(torch.arange(1.0, grid + 1))
        fitted = torch.linalg.lstsq(features.double(), wanted, driver="gelsd").solution.float()
        error = (features @ fitted - wanted).abs().max() / wanted.abs().max()
        if error < 1e-5:
            return fitted.T.contiguous(), {"freq_shift": freq_shift}
    return None


def _index_of_ours(denoiser: "Denoiser", grid: int) -> dict[str, Any]:
    """`model_index.json` of `pipeline.py`: the arguments of its class, the numbers being those of `sample`."""
    t = torch.arange(1, grid + 1) / grid  # in float32, as there
    alphas, sigmas = denoiser.schedule.alpha_sigma(denoiser.schedule(t))
    timesteps = denoiser.schedule.timestep(t)
    parameterization: Any = denoiser.parameterization
    kind = type(denoiser.network).__name__
    heads = None
    if isinstance(parameterization, Heads):
        counts = denoiser.step_counts if parameterization.counts else [len(parameterization.ratios)]
        heads = {str(n): blocks(parameterization, n).tolist() for n in counts}
        parameterization = parameterization.inner
    return {
        "_class_name": [PIPELINE.stem, "StudentPipeline"],
        "_diffusers_version": diffusers.__version__,
        "unet": [GUIDED.stem, kind] if kind == GuidedUNet2DModel.__name__ else ["diffusers", kind],
        "prediction": parameterization.name,
        "grid": {"timesteps": timesteps.tolist(), "alphas": alphas.tolist(), "sigmas": sigmas.tolist()},
        "num_steps": denoiser.num_steps or grid,
        "noise_scale": denoiser.schedule.noise_scale,
        "num_classes": denoiser.num_classes,
        "null_label": denoiser.null_label,
        "taught_guidance": denoiser.guidance,
        "heads": heads,
        "sampler": denoiser.sampler,
    } | ({"sigma_data": parameterization.sigma_data} if isinstance(parameterization, Edm) else {})
