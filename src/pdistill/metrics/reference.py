"""Samples in batches, FID while training, what the reference set looks like, and the provenance of a figure."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from pdistill import __version__
from pdistill.dataset import ImageSet
from pdistill.dataset.batches import to_uint8
from pdistill.denoiser import Denoiser
from pdistill.files import cache_directory
from pdistill.metrics.distances import FrechetDistance
from pdistill.metrics.extractors import cached
from pdistill.randomness import sample_noise
from pdistill.sampling import sample

REFERENCE_FEATURES = 50_000
SUMS = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")  # of torchmetrics' FID


def fid_name(extractor: nn.Module) -> str:
    """`fid` is Inception's alone; every other extractor's figure carries its name."""
    return "fid" if extractor.name == "inception" else f"fid_{extractor.name}"


def provenance(
    extractor: nn.Module, data: ImageSet, num_samples: int, seed: int, num_steps: int | None, sampler: str
) -> dict[str, object]:
    """What a figure was measured with: without it, a figure is a rumour."""
    return {
        "extractor": extractor.name,
        "extractor_fingerprint": extractor.fingerprint,
        "reference": data.name,
        "reference_fingerprint": data.fingerprint,
        "reference_size": len(data.images),
        "num_samples": num_samples,
        "sampler": sampler,
        "num_steps": num_steps,
        "clip": True,
        "seed": seed,
        "precision": "float32",
        "version": __version__,
    }


def reference(extractor: nn.Module, data: ImageSet, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What figures compare with, measured once and cached: torchmetrics' three sums over all of `data`, in float64,
    and the `features` (N, num_features) of at most REFERENCE_FEATURES images, evenly spread.
    """

    def measure() -> dict[str, Tensor]:
        total = -(-len(data.images) // 256)
        batches = tqdm(data.images.split(256), f"{extractor.name} features of {data.name}", total, leave=False)
        every = -(-len(data.images) // REFERENCE_FEATURES)
        kept, sums = [], FrechetInceptionDistance(feature=extractor).to(device)
        with torch.inference_mode():
            for images in batches:
                features = extractor(images.to(device))
                kept.append(features.float().cpu())
                features = features.double()
                sums.real_features_sum += features.sum(0)
                sums.real_features_cov_sum += features.T @ features
                sums.real_features_num_samples += len(features)
        return {k: getattr(sums, k).cpu().clone() for k in SUMS} | {"features": torch.cat(kept)[::every].clone()}

    path = cache_directory() / f"reference-2-{data.fingerprint}-{extractor.name}-{extractor.fingerprint}.safetensors"
    return cached(path, measure)


def fid_metric(
    extractor: nn.Module, data: ImageSet, rank: int = 0, device: torch.device | str = "cpu"
) -> FrechetInceptionDistance:
    """torchmetrics' FID against all of `data`, from cached statistics where there are any.

    The reference is set on rank 0 alone: torchmetrics adds the ranks' statistics up.
    """
    metric = FrechetInceptionDistance(feature=extractor, reset_real_features=False).to(device)
    sums = reference(extractor, data, device)
    for k in SUMS:
        setattr(metric, k, (sums[k] if rank == 0 else torch.zeros_like(sums[k])).to(device))
    return metric


def frechet_distance(reference: dict[str, Tensor], device: torch.device | str = "cpu") -> FrechetDistance:
    """The distance to what `reference` measured."""
    total, square, n = (reference[k].to(device) for k in SUMS)
    mean = total / n
    return FrechetDistance(mean, (square - n * mean[:, None] * mean) / (n - 1))


def generate(
    denoiser: Denoiser,
    indices: range,
    num_steps: int,
    seed: int,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    labels: Sequence[int] | None = None,
    **options,
) -> Iterator[Tensor]:
    """Batches of samples (B, C, H, W) in [-1, 1], image i from noise that depends on (seed, i) alone.

    A class-conditional denoiser draws image i of class `labels[i % len(labels)]`, by default of all its classes in
    turn, so that they are balanced. `options` go to `sample`.
    """
    shape = denoiser.image_shape
    if labels is None and denoiser.num_classes is not None:
        labels = range(denoiser.num_classes)
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        noise = sample_noise(seed, batch, shape).to(device)
        label = None if labels is None else torch.tensor([labels[i % len(labels)] for i in batch], device=device)

        def step_noise(i: int, batch: range = batch) -> Tensor:
            return sample_noise(seed, batch, shape, draw=i).to(device)

        yield sample(denoiser, noise, num_steps, label, step_noise=step_noise, **options)


def measure_fid(metric: FrechetInceptionDistance, batches: Iterator[Tensor]) -> float:
    """The FID of this rank's batches together with the other ranks' (torchmetrics gathers them once)."""
    metric.reset()
    with torch.inference_mode():
        for images in batches:
            metric.update(to_uint8(images), real=False)
    return float(metric.compute())
