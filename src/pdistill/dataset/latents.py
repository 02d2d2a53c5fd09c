"""Images and prompts as a text-to-image teacher sees them: latents and embeddings, each made once and kept on disk.

A table on disk is a directory: `rows.bin`, float16 rows one after the other, and `table.json`, the digests of each
CHUNK of them. Whoever finds it unfinished goes on after the last digest; whoever finds a file that was written to since
holds it against the digests.
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdistill.bars import bar
from pdistill.dataset.batches import Batches, BatchKey, to_float
from pdistill.dataset.images import ImageSet
from pdistill.errors import UserError
from pdistill.files import cache_directory, digest_of, locked, read_json, write_json
from pdistill.interop.stable_diffusion import Codec

CHUNK = 64  # rows between two notes of progress, and at once through the encoders
FILE, NOTES = "rows.bin", "table.json"


@dataclass(frozen=True)
class EncodedSet(ImageSet):
    """`images` are pixels, for metrics; training reads `latents` and `embeddings`. Images are not mirrored.

    Args:
        latents: float16 (N, c, h, w), mapped from a file.
        embeddings: float16 (P, L, D), those of `prompts`, mapped from a file.
    """

    latents: Any = None
    embeddings: Any = None

    def batches(self, batch_size: int, seed: int, stage: int, rank: int = 0, world: int = 1, start: int = 0) -> Any:
        """See ImageSet.batches: "image" is the latent, and "condition" what the network is given of the prompt."""
        return EncodedBatches(self, BatchKey(batch_size, seed, stage, rank, world, start))


class EncodedBatches(Batches):
    """The same images at the same steps as of the pixels."""

    def __init__(self, data: EncodedSet, key: BatchKey) -> None:
        super().__init__(data.latents, data.labels, False, key)
        self.embeddings = data.embeddings

    def batch(self, step: int) -> dict:
        """{"image": float16 (B, c, h, w), "condition": {"encoder_hidden_states": float16 (B, L, D)}, "step": step}."""
        batch = super().batch(step)
        return batch | {"condition": {"encoder_hidden_states": self.embeddings[batch.pop("label")]}}


def check_prompts(data: ImageSet) -> None:
    """Raises UserError where the images have no prompts, or are a stream."""
    if data.prompts is None or data.labels is None:
        raise UserError(
            f"a text-to-image teacher needs images with prompts, and dataset {data.name} has none: use "
            f"dataset=image_folder with \"dataset.prompt='a photo of a {{label}}'\" (its sub-folders) or '{{text}}' "
            f"(of its metadata.jsonl)"
        )


def encoded(data: ImageSet, codec: Codec, device: torch.device | str = "cpu") -> EncodedSet:
    """The images and their prompts through a codec, from the cache directory, or through it.

    A latent is the mean of the autoencoder's posterior times its scaling factor. Raises UserError where the images have
    no prompts, and for a cache that is damaged or cannot be written.
    """
    check_prompts(data)
    images, prompts = data.images, list(data.prompts or ())
    latents = table(
        cache_directory() / "latents" / f"{data.fingerprint}-{codec.digest('vae')}",
        len(images),
        lambda rows: codec.encode(to_float(images[rows]).to(device)),
        "latents of the images",
    )
    embeddings = table(
        cache_directory() / "prompts" / digest_of([codec.digest("text_encoder", "tokenizer"), *prompts]),
        len(prompts),
        lambda rows: codec.embed(prompts[rows], device),
        "embeddings of the prompts",
    )
    classes, digest = data.classes, data.digest
    return EncodedSet(data.name, images, data.labels, False, digest, classes, prompts, latents, embeddings)


def table(directory: Path, length: int, make: Callable[[slice], Tensor], title: str) -> Tensor:
    """`length` rows, float16 (length, ...), mapped from the directory, where `make(rows)` puts them if they are not.

    Raises UserError where it is damaged or cannot be written.
    """
    try:
        with locked(directory / ".lock"):
            notes = read_json(directory / NOTES, {"shape": None, "digests": [], "written": None})
            if not isinstance(notes["digests"], list) or any(side < 1 for side in notes["shape"] or ()):
                raise ValueError(f"{NOTES} does not say what a table says")
            if len(notes["digests"]) * CHUNK < length:
                notes = _make(directory, length, make, notes, title)
            return _mapped(directory, length, notes)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the cache {directory} cannot be used ({type(error).__name__}: {error}): delete it to make it again, or "
            f"give another place for all, PDISTILL_CACHE=<directory>"
        ) from error


def _make(directory: Path, length: int, make: Callable[[slice], Tensor], notes: dict, title: str) -> dict:
    """Goes on after the last chunk that is noted; returns the notes of all."""
    file, done = directory / FILE, len(notes["digests"]) * CHUNK
    counted = bar((), title, length, "row", initial=done, everywhere=True)  # one process makes it
    with counted, file.open("ab") as out:
        out.truncate(done * _bytes_of_row(notes["shape"]))  # what a killed process wrote after its last note
        for start in range(done, length, CHUNK):
            rows = make(slice(start, min(length, start + CHUNK))).half().cpu().numpy()
            out.write(rows.tobytes())
            out.flush()
            os.fsync(out.fileno())
            digests = [*notes["digests"], hashlib.sha256(rows.tobytes()).hexdigest()]
            notes = {"shape": list(rows.shape[1:]), "digests": digests, "written": file.stat().st_mtime_ns}
            write_json(directory / NOTES, notes)
            counted.update(len(rows))
    return notes


def _mapped(directory: Path, length: int, notes: dict) -> Tensor:
    file, row = directory / FILE, _bytes_of_row(notes["shape"])
    if (size := file.stat().st_size) != length * row:
        raise _damaged(file, f"{size} bytes instead of {length * row}")
    rows = np.memmap(file, np.float16, "c", shape=(length, *notes["shape"]))  # torch wants a writable array
    if file.stat().st_mtime_ns != notes["written"]:
        for k, digest in enumerate(notes["digests"][: -(-length // CHUNK)]):
            if hashlib.sha256(rows[k * CHUNK : (k + 1) * CHUNK].data).hexdigest() != digest:
                raise _damaged(file, "its content is not what was written")
    return torch.from_numpy(rows)


def _bytes_of_row(shape: Sequence[int] | None) -> int:
    return 0 if shape is None else 2 * math.prod(shape)


def _damaged(file: Path, problem: str) -> UserError:
    return UserError(f"{file} is damaged: {problem}. Delete {file.parent} to make it again")
