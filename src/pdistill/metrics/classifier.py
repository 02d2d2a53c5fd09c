"""The extractor of `metrics=classifier`: a small classifier, trained on the dataset's own labels once and cached."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pdistill.bars import bar
from pdistill.dataset import ImageSet
from pdistill.errors import UserError
from pdistill.files import cache_directory, locked, whole
from pdistill.processes import device_of
from pdistill.randomness import generator
from pdistill.reading import tensors_of

MAX_UPDATES = 3000  # small datasets get their epochs, large ones no more than this
SAVED_EVERY = 100  # updates
WIDTH = 32


class Classifier(nn.Module):
    """A small convolutional classifier trained on the dataset itself; its features are the last hidden layer's.

    For images on which Inception means nothing. Its FID is named fid_classifier: it compares samplers on one
    dataset, and with no published number.
    """

    name = "classifier"
    num_features = 64

    def __init__(self, channels: int, num_classes: int, width: int = WIDTH) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, self.num_features),
        )
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 127.5 - 1)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)


def class_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """How often logits (N, classes) say the class of labels (N,), in [0, 1], and the binomial standard deviation."""
    share = float((logits.argmax(1) == labels.to(logits.device)).float().mean())
    return {"class_accuracy": share, "class_accuracy_std": (share * (1 - share) / len(labels)) ** 0.5}


def train_classifier(
    data: ImageSet,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    max_updates: int = MAX_UPDATES,
    device: str = "auto",
    seed: int = 0,
    width: int = WIDTH,
) -> Classifier:
    """The classifier extractor of a dataset, trained on the spot once and cached, for `max_updates` at most.

    One process trains at a time, and the others wait for its file. A stopped training goes on where it was saved last,
    to the same weights. Another `seed` or `width`, the channels of its first layer, makes another extractor, for who
    wants a second opinion. Raises UserError where the dataset has no labels.
    """
    if data.labels is None:
        raise UserError(
            f"metrics=classifier needs labels, and {data.name} has none: put the images into one sub-folder per "
            f"class, or use metrics=auto, metrics=inception or metrics=none"
        )
    updates = min(max_updates, epochs * -(-len(data.images) // batch_size))
    recipe = f"classifier-2-{updates}-{batch_size}-{learning_rate}-{data.fingerprint}"
    recipe += f"-seed-{seed}-width-{width}" if (seed, width) != (0, WIDTH) else ""
    path = cache_directory() / f"{recipe}.safetensors"
    classifier = _fresh_classifier(data, seed, width)
    fresh = classifier.state_dict()
    weights = _load(path, fresh)
    if weights is None:
        with locked(path.with_suffix(".lock")):  # whoever comes second finds the file
            weights = _load(path, fresh)
            if weights is None:
                training = _Training(classifier, data, batch_size, learning_rate, path.with_suffix(".partial"), seed)
                weights = training.run(updates, device_of(device))
                with whole(path) as temporary:
                    save_file(weights, temporary)
                training.path.unlink(missing_ok=True)
    classifier.load_state_dict(weights)
    return classifier.cpu().eval().requires_grad_(False)


def _fresh_classifier(data: ImageSet, seed: int, width: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(data.image_shape[0], data.num_classes, width)


def _load(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file; None where it is absent, damaged, or holds others than `like`."""
    try:
        tensors = tensors_of(path)
    except (OSError, ValueError, UserError, SafetensorError):
        return None
    fits = tensors.keys() == like.keys() and all(
        tensors[k].shape == v.shape and tensors[k].dtype == v.dtype and bool(tensors[k].isfinite().all())
        for k, v in like.items()
    )
    return tensors if fits else None


class _Training:
    """Of the classifier; batch and learning rate are functions of the update, so that a resumed one is the same."""

    def __init__(
        self, classifier: Classifier, data: ImageSet, batch_size: int, learning_rate: float, path: Path, seed: int
    ) -> None:
        self.classifier, self.data = classifier, data
        self.batch_size, self.learning_rate = batch_size, learning_rate
        self.path = path
        self.key = [seed] if seed else []

    def run(self, updates: int, device: torch.device) -> dict[str, Tensor]:
        """The weights after so many updates, on the CPU."""
        classifier, labels_of_all = self.classifier.to(device).train(), self.data.labels
        assert labels_of_all is not None
        self.optimizer = torch.optim.AdamW(classifier.parameters(), lr=self.learning_rate)
        done = self._resume(updates)
        title = f"training the classifier of {self.data.name}"
        counted = bar((), title, updates, "update", initial=done, everywhere=True)  # one process trains it
        with counted, torch.enable_grad(), torch.inference_mode(False):
            for update in range(done, updates):
                random = generator("classifier", *self.key, update)
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

    def _resume(self, updates: int) -> int:
        """Updates that were done before, of so many; 0 where nothing was saved."""
        like = {f"weights {name}": p for name, p in self.classifier.named_parameters()}
        like |= {f"{k} {name}": p for name, p in self.classifier.named_parameters() for k in ("exp_avg", "exp_avg_sq")}
        like |= {f"step {name}": torch.zeros(()) for name, _ in self.classifier.named_parameters()}
        tensors = _load(self.path, like)
        if tensors is None or not all(0 < tensors[k] <= updates for k in tensors if k.startswith("step ")):
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
