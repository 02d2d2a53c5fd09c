"""The extractor of `metrics=auto`: a classifier of the dataset's labels, or without labels of how an image is turned.

To tell which way is up, a network must know what is in the pictures (Gidaris et al., 2018, 1803.07728).
"""

import torch
from torch import Tensor, nn

from pdistill.dataset import ImageSet
from pdistill.metrics.classifier import MAX_UPDATES, Classifier, train_classifier

FEW = 20  # images of a class, on average, below which sub-folders are no classes to learn
MOST_BYTES = 256 * 1024**2  # of the turned images


class Rotations(nn.Module):
    """The features of a small classifier that was trained to tell the four quarter turns of an image.

    Its FID is named fid_rotations: it compares samplers on one dataset, and with no published number.
    """

    name = "rotations"
    num_features = Classifier.num_features

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 127.5 - 1)


def train_rotations(data: ImageSet, max_updates: int = MAX_UPDATES, device: str = "auto") -> Rotations:
    """The extractor for images without labels, trained on the spot once and cached, as `train_classifier` is.

    Of a large dataset it learns from an evenly spread part.
    """
    images = data.images
    most = max(1, MOST_BYTES // (4 * images[0].numel()))
    images = images[:: -(-len(images) // most)]
    turned = torch.cat([images.rot90(quarters, (2, 3)) for quarters in range(4)])
    labels = torch.arange(4).repeat_interleave(len(images))
    classifier = train_classifier(
        ImageSet(f"{data.name}, turned", turned, labels), max_updates=max_updates, device=device
    )
    return Rotations(classifier.layers)


def fitting(data: ImageSet, max_updates: int = MAX_UPDATES, device: str = "auto") -> nn.Module:
    """The classifier of the dataset's labels; `Rotations` where it has none, or hardly any images of a class."""
    if data.labels is None or len(data.images) < FEW * (data.num_classes or 1):
        return train_rotations(data, max_updates, device)
    return train_classifier(data, max_updates=max_updates, device=device)
