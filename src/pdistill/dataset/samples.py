"""`dataset=none`: a teacher's own samples in the place of the images that it was trained on."""

from pathlib import Path

import numpy as np
import torch

from pdistill.bars import bar
from pdistill.checks import whole as whole_number
from pdistill.dataset.batches import to_uint8
from pdistill.dataset.images import ImageSet
from pdistill.denoiser import Denoiser
from pdistill.files import cache_directory, locked, whole
from pdistill.generation import Draw, generate
from pdistill.reading import array_of

CHUNK = 250  # samples of a file


def teacher_samples(
    teacher: Denoiser,
    num_steps: int,
    device: torch.device | str = "cpu",
    num_images: int = 10_000,
    seed: int = 0,
    cache: str | None = None,
) -> ImageSet:
    """`num_images` samples of the teacher by its sampler, in `num_steps`, clipped; with its classes in turn as labels.

    Sample i depends on (weights, num_steps, seed, i) alone. They are made once and kept in the cache directory in files
    of 250: what a stopped run has made is not made again, and more images only add to them. Raises UserError for
    samples that are not finite.
    """
    whole_number("dataset.num_images", num_images, 1)
    whole_number("dataset.seed", seed, 0)
    root = cache_directory() if cache is None else Path(cache).expanduser()
    folder = root / "samples" / f"{teacher.fingerprint}-{num_steps}-steps-seed-{seed}"
    draw, images = Draw(num_steps, seed, CHUNK), []
    with locked(folder / ".lock"):
        for k in bar(range(-(-num_images // CHUNK)), "samples of the teacher", unit="batch"):
            file = folder / f"{k:05d}.npy"
            drawn = _read(file, teacher.pixel_shape)
            if drawn is None:
                batches = generate(teacher.to(device), range(k * CHUNK, (k + 1) * CHUNK), draw, device)
                drawn = torch.cat([to_uint8(batch).cpu() for batch in batches]).numpy()
                with whole(file) as temporary, temporary.open("wb") as content:
                    np.save(content, drawn)
            images.append(torch.from_numpy(drawn))
    classes = teacher.num_classes
    labels = None if classes is None else torch.arange(num_images) % classes
    name = f"of {num_images} samples of the teacher"
    return ImageSet(name, torch.cat(images)[:num_images], labels, classes=classes)


def _read(file: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    """The samples of a file, uint8 (CHUNK, C, H, W); None where it is absent or damaged."""
    try:
        return array_of(file, "uint8", (CHUNK, *shape))
    except (FileNotFoundError, ValueError):
        return None
