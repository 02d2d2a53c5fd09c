"""Feature extractors, the Frechet distance on their features, and cached reference statistics.

An extractor is a module that maps uint8 images (B, C, H, W) to features (B, num_features), with a `name`,
under which its figures are reported, and a `fingerprint` of its weights.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from pdistill import __version__
from pdistill.batches import to_uint8
from pdistill.dataset import ImageSet
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.image_cache import cache_directory
from pdistill.randomness import generator, sample_noise
from pdistill.sampling import sample


def _cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, made and written (whole or not at all) when absent or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        tensors = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, temporary)
        temporary.replace(path)
        return tensors


def _weights_fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().cpu().numpy())
    return digest.hexdigest()[:16]


class Classifier(nn.Module):
    """A small convolutional classifier trained on the dataset itself; its features are the last hidden layer's.

    For images on which Inception means nothing. Its FID is named fid_classifier: it compares samplers on one
    dataset, and with no published figure.
    """

    name = "classifier"
    num_features = 64

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, self.num_features),
        )
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 127.5 - 1)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    @property
    def fingerprint(self) -> str:
        return _weights_fingerprint(self)


def train_classifier(data: ImageSet, epochs: int = 20, batch_size: int = 64, learning_rate: float = 2e-3) -> Classifier:
    """The classifier extractor of a dataset: trained on the spot with a fixed seed, then cached.

    Raises UserError where the dataset has no labels.
    """
    if data.labels is None:
        raise UserError(
            f"metrics=classifier needs labels, and {data.name} has none: put the images into one sub-folder per "
            f"class, or use metrics=inception or metrics=none"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(data.image_shape[0], data.num_classes)

    def train() -> dict[str, Tensor]:
        random = generator(0)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate)
        updates = epochs * -(-len(data.images) // batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
        for _ in range(updates):
            index = torch.randint(len(data.images), (batch_size,), generator=random)
            loss = F.cross_entropy(classifier.head(classifier(data.images[index])), data.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return {k: v.clone() for k, v in classifier.state_dict().items()}

    recipe = f"classifier-1-{epochs}-{batch_size}-{learning_rate}"
    classifier.load_state_dict(_cached(cache_directory() / f"{recipe}-{data.fingerprint}.safetensors", train))
    return classifier.eval().requires_grad_(False)


class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow InceptionV3, 2048 pool features: the FID of the literature."""

    name = "inception"
    num_features = 2048

    def __init__(self, weights: str | None = None) -> None:
        """`weights`: a file of torch-fidelity's weights; by default its cache, or a download."""
        super().__init__()
        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
        except Exception as error:
            raise UserError(
                f"Inception's weights are not to be had ({type(error).__name__}: {str(error).splitlines()[0]}): go "
                f"online once, give metrics.extractor.weights=<file>, or use metrics=classifier"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.expand(-1, 3, -1, -1))

    @property
    def fingerprint(self) -> str:
        return _weights_fingerprint(self)


def inception(data: ImageSet, weights: str | None = None) -> Inception:
    """The extractor of the literature; `data` is not needed."""
    return Inception(weights)


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


def fid_metric(
    extractor: nn.Module, data: ImageSet, rank: int = 0, device: torch.device | str = "cpu"
) -> FrechetInceptionDistance:
    """torchmetrics' FID against all of `data`, from cached statistics where there are any.

    The reference is set on rank 0 alone: torchmetrics adds the ranks' statistics up.
    """
    metric = FrechetInceptionDistance(feature=extractor, reset_real_features=False).to(device)
    states = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")

    def measure() -> dict[str, Tensor]:
        with torch.inference_mode():
            for images in data.images.split(256):
                metric.update(images.to(device), real=True)
        return {state: getattr(metric, state).cpu().clone() for state in states}

    path = cache_directory() / f"reference-{data.fingerprint}-{extractor.name}-{extractor.fingerprint}.safetensors"
    reference = _cached(path, measure)
    for state in states:
        value = reference[state] if rank == 0 else torch.zeros_like(reference[state])
        setattr(metric, state, value.to(device))
    return metric


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
