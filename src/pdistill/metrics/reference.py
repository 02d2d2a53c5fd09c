"""What a dataset looks like to an extractor: mean and covariance of all its images, and the features of some.

Measured once and cached. Several processes share the images.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pdistill.dataset import ImageSet
from pdistill.errors import UserError
from pdistill.files import cache_directory, digest_of, locked, whole
from pdistill.metrics.distances import double
from pdistill.metrics.extractors import fingerprint_of
from pdistill.metrics.shares import in_order, leads, my_batches, together
from pdistill.processes import gather, of_main, world_size
from pdistill.randomness import generator
from pdistill.reading import check_tensors

REFERENCE_FEATURES = 50_000  # kept at most
BATCH = 256


@dataclass(frozen=True)
class Reference:
    """Of all images: `mean` (num_features,) and `covariance`, in float64; `features` float32 (N, num_features) of at
    most 50,000 of them, a fixed random choice in the dataset's order, on the main process if they were asked for.
    """

    mean: Tensor
    covariance: Tensor
    features: Tensor | None = None


def reference(
    extractor: nn.Module, data: ImageSet, device: torch.device | str = "cpu", features: bool = True
) -> Reference:
    """The reference of `data`, from the cache or through it, on the CPU; the same on every process.

    Every process must call it. Without `features` none are kept in memory. Raises UserError for a dataset of fewer than
    two images, and for features that are not finite.
    """
    if len(data.images) < 2:
        raise UserError(f"{data.name} has {len(data.images)} image: metrics need at least 2 to compare with")
    path = _path(extractor, data)
    # While another process of another command measures the same, this one waits, unless others here wait for it.
    lock = locked(path.with_suffix(".lock"), wait=world_size() == 1) if leads() else contextlib.nullcontext()
    with lock if not path.exists() else contextlib.nullcontext():
        found = _read(path, features, getattr(extractor, "num_features", None)) if leads() else None
        shared = of_main(None if found is None else (found.mean, found.covariance))
        if shared is not None:
            return found or Reference(*shared)
        measured = together(lambda: _measure(extractor.to(device), data, device))
        if leads():
            tensors = {"mean": measured.mean, "covariance": measured.covariance, "features": measured.features}
            with whole(path) as temporary:
                save_file({k: v for k, v in tensors.items() if v is not None}, temporary)
    return measured if features and leads() else Reference(measured.mean, measured.covariance)


def _path(extractor: nn.Module, data: ImageSet) -> Path:
    key = digest_of([data.fingerprint, str(extractor.name), fingerprint_of(extractor)])
    return cache_directory() / f"reference-3-{extractor.name}-{key}.safetensors"


def _read(path: Path, features: bool, width: int | None) -> Reference | None:
    """None where the file is absent or damaged, or holds something else than features of so many numbers."""
    try:
        check_tensors(path)
        with safe_open(path, "pt") as file:
            kept = file.get_tensor("features") if features else None
            found = Reference(file.get_tensor("mean"), file.get_tensor("covariance"), kept)
    except (OSError, ValueError, UserError, SafetensorError):
        return None
    width = width or found.mean.numel()  # of an extractor that does not say
    fits = found.mean.shape == (width,) and found.covariance.shape == (width, width)
    fits = fits and (kept is None or (kept.ndim == 2 and kept.shape[1] == width))
    tensors = [t for t in (found.mean, found.covariance, kept) if t is not None]
    return found if fits and all(t.is_floating_point() and bool(t.isfinite().all()) for t in tensors) else None


@torch.inference_mode()
def _measure(extractor: nn.Module, data: ImageSet, device: torch.device | str) -> Reference:
    """Sums of differences from the mean of the first images, so that nothing cancels, added up over processes."""
    kept_ones = chosen(data)

    def features_of(batch: range) -> Tensor:
        return extractor(data.images[batch.start : batch.stop].to(device)).float()

    origin = double(features_of(range(min(BATCH, len(data.images))))).mean(0)
    total, square, kept = torch.zeros_like(origin), origin.new_zeros(len(origin), len(origin)), []
    for batch in my_batches(len(data.images), BATCH, f"{extractor.name} features of {data.name}"):
        features = features_of(batch)
        kept.append(features[kept_ones[batch.start : batch.stop].to(features.device)].cpu())
        centred = double(features) - origin
        total += centred.sum(0)
        square += centred.T @ centred
    sums = gather((total.cpu(), square.cpu()))
    total, square = (torch.stack(of_ranks).sum(0) for of_ranks in zip(*sums, strict=True))
    n, shift = len(data.images), total / len(data.images)
    covariance = (square - n * shift[:, None] * shift) / (n - 1)
    if not covariance.isfinite().all():
        raise UserError(f"{extractor.name} gives features of {data.name} that are not finite (NaN or infinite)")
    kept = in_order(kept)
    return Reference(origin.cpu() + shift, covariance, torch.cat(kept) if leads() else None)


def chosen(data: ImageSet) -> Tensor:
    """Which images' features are kept, bool (N,): as many as may be, at random by a key that the content gives.

    A folder's order is that of its classes, and its first images are of few.
    """
    n = len(data.images)
    random = generator("reference", int.from_bytes(data.fingerprint.encode()))
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.randperm(n, generator=random)[:REFERENCE_FEATURES]] = True
    return chosen
