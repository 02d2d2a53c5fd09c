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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.image.fid import NoTrainInceptionV3

from pdistill.bars import bar
from pdistill.dataset import ImageSet
from pdistill.errors import UserError, first_line
from pdistill.files import cache_directory, digest_of_file, locked, whole
from pdistill.processes import device_of, of_main, world_size
from pdistill.randomness import generator

MAX_UPDATES = 3000  # of the classifier: small datasets get their epochs, large ones no more than this
SAVED_EVERY = 100  # updates of the classifier


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
    digest = hashlib.sha256(f"{type(extractor).__module__}.{type(extractor).__qualname__}".encode())
    for name, value in sorted(extractor.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _parameters_fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


class Classifier(nn.Module):
    """A small convolutional classifier trained on the dataset itself; its features are the last hidden layer's.

    For images on which Inception means nothing. Its FID is named fid_classifier: it compares samplers on one
    dataset, and with no published number.
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
        return _parameters_fingerprint(self)


def train_classifier(
    data: ImageSet,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    max_updates: int = MAX_UPDATES,
    device: str = "auto",
) -> Classifier:
    """The classifier extractor of a dataset, trained on the spot once and cached, for `max_updates` at most.

    One process trains at a time, and the others wait for its file. A stopped training goes on where it was saved last,
    to the same weights. Raises UserError where the dataset has no labels.
    """
    if data.labels is None:
        raise UserError(
            f"metrics=classifier needs labels, and {data.name} has none: put the images into one sub-folder per "
            f"class, or use metrics=inception or metrics=none"
        )
    updates = min(max_updates, epochs * -(-len(data.images) // batch_size))
    recipe = f"classifier-2-{updates}-{batch_size}-{learning_rate}-{data.fingerprint}"
    path = cache_directory() / f"{recipe}.safetensors"
    classifier = _fresh_classifier(data)
    weights = _load(path)
    if weights is None:
        with locked(path.with_suffix(".lock")):  # whoever comes second finds the file
            weights = _load(path)
            if weights is None:
                training = _Training(classifier, data, batch_size, learning_rate, path.with_suffix(".partial"))
                weights = training.run(updates, device_of(device))
                with whole(path) as temporary:
                    save_file(weights, temporary)
                training.path.unlink(missing_ok=True)
    classifier.load_state_dict(weights)
    return classifier.cpu().eval().requires_grad_(False)


def _fresh_classifier(data: ImageSet) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(data.image_shape[0], data.num_classes)


def _load(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file; None where it is absent or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


class _Training:
    """Of the classifier; batch and learning rate are functions of the update, so that a resumed one is the same."""

    def __init__(
        self, classifier: Classifier, data: ImageSet, batch_size: int, learning_rate: float, path: Path
    ) -> None:
        self.classifier, self.data = classifier, data
        self.batch_size, self.learning_rate = batch_size, learning_rate
        self.path = path

    def run(self, updates: int, device: torch.device) -> dict[str, Tensor]:
        """The weights after so many updates, on the CPU."""
        classifier, labels_of_all = self.classifier.to(device).train(), self.data.labels
        assert labels_of_all is not None
        self.optimizer = torch.optim.AdamW(classifier.parameters(), lr=self.learning_rate)
        done = self._resume()
        title = f"training the classifier of {self.data.name}"
        counted = bar((), title, updates, "update", initial=done, everywhere=True)  # one process trains it
        with counted, torch.enable_grad(), torch.inference_mode(False):
            for update in range(done, updates):
                random = generator("classifier", update)
                index = torch.randint(len(self.data.images), (self.batch_size,), generator=random)
                images, labels = self.data.images[index].to(device), labels_of_all[index].to(device)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate * (1 - update / updates)
                loss = F.cross_entropy(classifier.head(classifier(images)), labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                counted.update()
                if (update + 1) % SAVED_EVERY == 0:
                    self._save(update + 1)
        return {k: v.detach().cpu().clone() for k, v in classifier.state_dict().items()}

    def _save(self, update: int) -> None:
        tensors = {f"weights {name}": p.detach().cpu() for name, p in self.classifier.named_parameters()}
        for name, parameter in self.classifier.named_parameters():
            state = self.optimizer.state[parameter]
            tensors |= {f"{key} {name}": state[key].cpu() for key in ("exp_avg", "exp_avg_sq", "step")}
        with whole(self.path) as temporary:
            save_file(tensors, temporary, metadata={"update": str(update)})

    def _resume(self) -> int:
        """Updates that were done before; 0 where nothing was saved."""
        tensors = _load(self.path)
        if tensors is None:
            return 0
        done = 0
        with torch.no_grad():
            for name, parameter in self.classifier.named_parameters():
                parameter.copy_(tensors[f"weights {name}"])
                state = {key: tensors[f"{key} {name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
                moved = {key: value.to(parameter.device) for key, value in state.items() if key != "step"}
                self.optimizer.state[parameter] = moved | {"step": state["step"]}
                done = int(state["step"])
        return done


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
            if file.exists() or weights:
                _check_digest(file)
            self.network: Any = NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], weights and str(file), antialias=False
            )
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
        return _parameters_fingerprint(self)


def _check_digest(file: Path) -> None:
    """The published file's name ends with the beginning of its SHA-256; unpickling any other is not safe."""
    published = Path(URL_INCEPTION_V3).stem.rpartition("-")[2]
    digest = digest_of_file(file)
    if not digest.startswith(published):
        raise UserError(
            f"{file} is damaged or holds other weights: its SHA-256 begins with {digest[:8]}, that of the published "
            f"{Path(URL_INCEPTION_V3).name} with {published}. Delete it and fetch that file again"
        )


def inception(data: ImageSet, weights: str | None = None) -> Inception:
    """The extractor of the literature; `data` is not needed."""
    return Inception(weights)
