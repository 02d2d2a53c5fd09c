"""Feature extractors: modules that map uint8 images (B, C, H, W) to features (B, num_features).

An extractor is built by a function of the dataset. It has a `name`, under which its metrics are reported; `logits` of
its features, if there is to be an Inception score; and may have a `fingerprint` and `num_features` of its own.
"""

import hashlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.image.fid import NoTrainInceptionV3

from pdistill.dataset import ImageSet
from pdistill.errors import UserError, first_line
from pdistill.files import digest_of_file
from pdistill.network import digest_of_weights
from pdistill.processes import of_main, world_size


def build(part: Callable[..., nn.Module], data: ImageSet, device: torch.device | str = "auto") -> nn.Module:
    """The extractor that `part(data)` makes, in eval mode and without gradients, the same in every process.

    `device` is handed on where `part` takes it. Raises UserError where the extractor has no name, or does not map the
    dataset's images to finite features of one size.
    """
    extractor = part(data, device=str(device)) if _takes_device(part) else part(data)
    if not isinstance(extractor, nn.Module):
        raise UserError(f"metrics.extractor gives a {type(extractor).__name__}: it must give a torch.nn.Module")
    name = getattr(extractor, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(
            f"the extractor {type(extractor).__name__} has name={name!r}: give it a `name` of letters, digits and "
            f". + - _, under which its metrics are reported"
        )
    extractor.eval().requires_grad_(False)
    if world_size() > 1:
        extractor.load_state_dict(of_main({k: v.cpu() for k, v in extractor.state_dict().items()}))
    _check_features(extractor, data)
    return extractor


def _takes_device(part: Callable[..., nn.Module]) -> bool:
    """Whether `part` has a keyword `device` that the configuration did not fill."""
    try:
        return "device" in inspect.signature(part).parameters and "device" not in getattr(part, "keywords", {})
    except ValueError:  # written in C
        return False


def _check_features(extractor: nn.Module, data: ImageSet) -> None:
    try:
        with torch.inference_mode():
            features = extractor(data.images[:2])
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"the extractor {extractor.name} cannot take the images of {data.name}, uint8 of shape {data.image_shape} "
            f"({first_line(error)})"
        ) from error
    expected = getattr(extractor, "num_features", None)
    if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != (expected or features.shape[1]):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(
            f"the extractor {extractor.name} must map images (B, C, H, W) to features "
            f"(B, {expected or 'num_features'}), and gives {found} for two images"
        )
    if not features.isfinite().all():
        raise UserError(f"the extractor {extractor.name} gives features that are not finite (NaN or infinite)")
    if expected is None:
        object.__setattr__(extractor, "num_features", features.shape[1])


def metric_name(metric: str, extractor: nn.Module) -> str:
    """`fid`, `kid` and `is` alone are Inception's; another extractor's carry its name, such as fid_classifier."""
    return metric if extractor.name == "inception" else f"{metric}_{extractor.name}"


def fingerprint_of(extractor: nn.Module) -> str:
    """The extractor's own `fingerprint`; without one, 16 hexadecimal digits of its class and weights."""
    own = getattr(extractor, "fingerprint", None)
    if own is not None:
        return str(own() if callable(own) else own)
    return digest_of_weights(extractor, f"{type(extractor).__module__}.{type(extractor).__qualname__}")


class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow InceptionV3, 2048 pool features: the FID of the literature.

    Images are enlarged as TensorFlow 1 did it (`antialias=False`); torchmetrics' own default gives other numbers.

    Raises UserError where its weights are not available, or are not the published ones.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, weights: str | None = None) -> None:
        """`weights`: a file of torch-fidelity's weights; by default its cache, or a download."""
        super().__init__()
        file = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name).expanduser()
        try:
            if not file.exists() and not weights:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file))
            _check_digest(file)
            self.network: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file), antialias=False)
        except OSError as error:  # of which the failures of a download are
            raise UserError(
                f"Inception's weights are not available ({type(error).__name__}: {first_line(error)}): go online "
                f"once, give metrics.extractor.weights=<file>, or use metrics=classifier"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.expand(-1, 3, -1, -1))

    def logits(self, features: Tensor) -> Tensor:
        weight: Any = self.network.fc.weight
        return F.linear(features, weight)  # without the bias, as in the published Inception score

    @property
    def fingerprint(self) -> str:
        """Of the parameters alone, as in 0.1.0: its rows compare with today's."""
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]


def _check_digest(file: Path) -> None:
    """The published file's name ends with the beginning of its SHA-256, 32 bits. torch-fidelity unpickles the file."""
    published = Path(URL_INCEPTION_V3).stem.rpartition("-")[2]
    digest = digest_of_file(file)
    if not digest.startswith(published):
        raise UserError(
            f"{file} is damaged or holds other weights: its SHA-256 begins with {digest[:8]}, that of the published "
            f"{Path(URL_INCEPTION_V3).name} with {published}. Delete it and fetch that file again"
        )
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} holds more than weights, which never runs ({first_line(error, 100)})") from error


def inception(data: ImageSet, weights: str | None = None) -> Inception:
    """The extractor of the literature; `data` is not needed."""
    return Inception(weights)
