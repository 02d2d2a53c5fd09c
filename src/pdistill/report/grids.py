"""Grids of samples, as PNGs."""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from pdistill.dataset.batches import to_float
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.metrics.reference import generate


def save_grid(images: Tensor, path: Path, nrow: int = 8, tile: int = 48) -> None:
    """A PNG of (B, C, H, W) in [-1, 1], tiles enlarged without smoothing to at least `tile` pixels."""
    scale = max(1, tile // images.shape[-1])
    enlarged = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    temporary = path.with_name(f".{path.name}")
    save_image(enlarged, temporary, nrow=nrow, normalize=True, value_range=(-1, 1), padding=2, pad_value=1.0)
    temporary.replace(path)


@torch.inference_mode()
def nearest_neighbours(samples: Tensor, images: Tensor, k: int = 3, chunk: int = 4096) -> Tensor:
    """The `k` nearest of uint8 `images` (N, C, H, W) to samples (B, C, H, W) in [-1, 1]: (B, k, C, H, W) in [-1, 1].

    By Euclidean distance of the pixels, nearest first.
    """
    distances = [
        torch.cdist(samples.flatten(1), to_float(part.to(samples.device)).flatten(1)) for part in images.split(chunk)
    ]
    nearest = torch.cat(distances, 1).topk(min(k, len(images)), largest=False).indices.cpu()
    return torch.stack([to_float(images[index]) for index in nearest]).to(samples.device)


def draw(cfg: DictConfig) -> Path:
    """What sample.py does; returns the grid's path. Raises UserError where the settings do not fit the denoiser."""
    if cfg.denoiser is None:
        raise UserError("denoiser=<directory> is missing, e.g. denoiser=outputs/demo/steps-0004/denoiser")
    denoiser = Denoiser.load(cfg.denoiser)
    num_steps = cfg.num_steps or denoiser.num_steps
    if num_steps is None:
        raise UserError(f"denoiser={cfg.denoiser} is a teacher, made for no step count of its own: give num_steps=...")
    for key, value in {"num_steps": num_steps, "num_images": cfg.num_images, "batch_size": cfg.batch_size}.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key}={value} must be a whole number, at least 1")
    labels = _labels(cfg, denoiser.num_classes)
    device = device_of(cfg.device)
    denoiser.to(device)
    if not isinstance(cfg.guidance, int | float):
        raise UserError(f"guidance={cfg.guidance} must be a number")
    options = {
        "labels": labels,
        "guidance": cfg.guidance,
        "sampler": cfg.sampler,
        "variance": cfg.variance,
        "clip": cfg.clip,
    }
    batches = generate(denoiser, range(cfg.num_images), num_steps, cfg.seed, cfg.batch_size, device, **options)
    try:
        total = -(-cfg.num_images // cfg.batch_size)
        images = torch.cat([b.cpu() for b in tqdm(batches, f"{num_steps} steps", total, unit="batch")])
    except ValueError as error:  # an unknown sampler or variance
        raise UserError(str(error)) from error
    grid = Path(cfg.output or f"outputs/samples/{name_of(Path(cfg.denoiser))}-{num_steps}-steps-seed-{cfg.seed}.png")
    grid.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, grid)
    if cfg.individual:
        folder = grid.with_suffix("")
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            save_image(image, folder / f"{i:05d}.png", normalize=True, value_range=(-1, 1))
    return grid


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. Raises UserError where it is not to be had."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} is not to be had here ({str(error).splitlines()[0]})") from error


def _labels(cfg: DictConfig, num_classes: int | None) -> list[int] | None:
    if cfg.label is None:
        return None
    labels = [cfg.label] if isinstance(cfg.label, int) else list(cfg.label)
    if num_classes is None:
        raise UserError(
            f"label={cfg.label} is given, and denoiser={cfg.denoiser} is not class-conditional: leave it out"
        )
    if not labels or not all(isinstance(k, int) and 0 <= k < num_classes for k in labels):
        raise UserError(f"label={cfg.label} must be of the classes 0 to {num_classes - 1}")
    return labels


def name_of(denoiser: Path) -> str:
    """outputs/demo/steps-0004/denoiser -> demo-steps-0004"""
    return "-".join(denoiser.resolve().parts[-3:-1])
