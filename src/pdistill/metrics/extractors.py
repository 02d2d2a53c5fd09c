"""Feature extractors: modules that map uint8 images (B, C, H, W) to features (B, num_features).

Each has a `name`, under which its figures are reported, and a `fingerprint` of its weights.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.image.fid import NoTrainInceptionV3

from pdistill.dataset import ImageSet
from pdistill.errors import UserError
from pdistill.files import cache_directory
from pdistill.randomness import generator


def cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
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
    classifier.load_state_dict(cached(cache_directory() / f"{recipe}-{data.fingerprint}.safetensors", train))
    return classifier.eval().requires_grad_(False)


class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow InceptionV3, 2048 pool features: the FID of the literature.

    Images are enlarged as TensorFlow 1 did it (`antialias=False`); torchmetrics' own default gives other figures.

    Raises UserError where its weights are not to be had, or are not the published ones.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, weights: str | None = None) -> None:
        """`weights`: a file of torch-fidelity's weights; by default its cache, or a download."""
        super().__init__()
        file = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name)
        try:
            if file.exists() or weights:
                _check_digest(file)
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights, antialias=False)
        except OSError as error:  # of which the failures of a download are
            raise UserError(
                f"Inception's weights are not to be had ({type(error).__name__}: {str(error).splitlines()[0]}): go "
                f"online once, give metrics.extractor.weights=<file>, or use metrics=classifier"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.expand(-1, 3, -1, -1))

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.network.fc.weight)  # without the bias, as in the published Inception score

    @property
    def fingerprint(self) -> str:
        return _weights_fingerprint(self)


def _check_digest(file: Path) -> None:
    """The published file's name ends with the beginning of its SHA-256; unpickling any other is not safe."""
    published = Path(URL_INCEPTION_V3).stem.rpartition("-")[2]
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if not digest.startswith(published):
        raise UserError(
            f"{file} is damaged or holds other weights: its SHA-256 begins with {digest[:8]}, that of the published "
            f"{Path(URL_INCEPTION_V3).name} with {published}. Delete it and fetch that file again"
        )


def inception(data: ImageSet, weights: str | None = None) -> Inception:
    """The extractor of the literature; `data` is not needed."""
    return Inception(weights)
