"""What a metric was measured with, which metrics may stand side by side, and whether their weights are still there.

A row is a dict of metrics, with what they were measured with under "provenance". Rows of version 0.1.0 lack `device`
and `denoiser_fingerprint`, and their `precision` is what was assumed, not what was in force.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdistill import __version__
from pdistill.checks import is_count
from pdistill.errors import UserError
from pdistill.files import read_json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pdistill.dataset import ImageSet

Provenance = dict[str, Any]

# Keys that are not only compared and shown, and what they may hold.
KINDS: dict[str, Callable[[Any], bool]] = {
    "num_steps": lambda value: value is None or is_count(value),
    "network_evaluations": lambda value: value is None or is_count(value),
    "guidance": lambda value: isinstance(value, int | float) and math.isfinite(value),
    "denoiser": lambda value: value is None or isinstance(value, str),
    "denoiser_fingerprint": lambda value: value is None or isinstance(value, str),
    "label": lambda value: isinstance(value, str),
}
# What must be equal for two metrics to be compared.
MATTERS = ("extractor", "extractor_fingerprint", "reference_fingerprint", "num_samples", "clip", "precision")


def is_provenance(value: object) -> bool:
    """Whether it can be one, of whatever version: a dict whose keys, as far as they are here, hold what they may."""
    return isinstance(value, dict) and all(known(value[key]) for key, known in KINDS.items() if key in value)


def are_measured(rows: object) -> bool:
    """Whether they can be the rows of an evaluation, each with its provenance and a label in it."""
    return isinstance(rows, list) and all(
        isinstance(row, dict) and is_provenance(row.get("provenance")) and "label" in row["provenance"] for row in rows
    )


def comparable(ours: Provenance, theirs: Provenance) -> list[str]:
    """What makes two metrics no comparison, by their provenances, as "key theirs, there ours"; empty if nothing."""
    ours, theirs = _as_recorded(ours), _as_recorded(theirs)
    return [f"{k} {theirs.get(k)}, there {ours.get(k)}" for k in MATTERS if ours.get(k) != theirs.get(k)]


def _as_recorded(made_with: Provenance) -> Provenance:
    """Where the device is not recorded, the precision is not known: on a GPU it may have been TF32."""
    known = "device" in made_with or "precision" not in made_with
    return made_with if known else made_with | {"precision": "not recorded"}


def measured_with(
    extractor: "nn.Module", data: "ImageSet", num_samples: int, seed: int, device: "torch.device | str"
) -> Provenance:
    """The part of the provenance that all rows of an evaluation share."""
    from pdistill.metrics.extractors import fingerprint_of

    return {
        "extractor": extractor.name,
        "extractor_fingerprint": fingerprint_of(extractor),
        "reference": data.name,
        "reference_fingerprint": data.fingerprint,
        "reference_size": len(data.images),
        "num_samples": num_samples,
        "seed": seed,
        "precision": precision_in_force(device),
        "device": _type_of(device),
        "version": __version__,
    }


def drawn_by(fingerprint: str | None, sampler: str, num_steps: int | None, clip: bool | None) -> Provenance:
    """The part of the provenance that says whose samples a row is of; `clip`: every prediction clamped to [-1, 1]."""
    return {"denoiser_fingerprint": fingerprint, "sampler": sampler, "num_steps": num_steps, "clip": clip}


def guided_by(model: Any, num_steps: int, guidance: float | None = None) -> Provenance:
    """The part of the provenance that says the guidance, given or by default; nothing where none was given or taught.

    `network_evaluations` of a sample stand there where they are two a step.
    """
    taught = getattr(model, "guidance", None)
    if guidance is None and taught is None:
        return {}
    value = model.default_guidance if guidance is None else guidance
    return {"guidance": value} | ({"network_evaluations": 2 * num_steps} if taught is None and value != 1 else {})


def evaluations(made_with: Provenance) -> int | None:
    """Network evaluations of a sample: one a step, or two of guidance that was not taught; None of real images."""
    return made_with.get("network_evaluations") or made_with.get("num_steps")


def precision_in_force(device: "torch.device | str") -> str:
    """What float32 networks compute with on the device: "float32", "float32 with tf32 convolutions", "bfloat16", ..."""
    import torch

    kind = _type_of(device)
    if torch.is_autocast_enabled(kind):
        return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
    name = str(torch.get_default_dtype()).removeprefix("torch.")
    backends: Any = torch.backends  # whose submodules type checkers do not know
    operations = {
        "cuda": {"matrix products": backends.cuda.matmul, "convolutions": backends.cudnn.conv},
        "cpu": {"matrix products": backends.mkldnn.matmul, "convolutions": backends.mkldnn.conv},
    }.get(kind, {})
    reduced = [
        f"{operation.fp32_precision} {words}"
        for words, operation in operations.items()
        if operation.fp32_precision not in ("none", "ieee")
    ]
    return f"{name} with {' and '.join(reduced)}" if reduced else name


def _type_of(device: "torch.device | str") -> str:
    return str(device).partition(":")[0]


def same(ours: Provenance, theirs: Provenance) -> bool:
    """Whether the one metric can stand for the other: all is equal but the version, and where the weights lie."""

    def compared(made_with: Provenance) -> Provenance:
        return {k: v for k, v in made_with.items() if k not in ("version", "denoiser")}

    return compared(ours) == compared(theirs)


def replaces(new: Provenance, old: Provenance) -> bool:
    """Whether a new row takes an old one's place.

    It does where it is the same measurement, and where the old one is of other weights, or of weights that nobody
    recorded, at the same path.
    """
    if same(new, old):
        return True
    place = ("denoiser", "label", "sampler", "num_steps")
    here = new.get("denoiser") is not None and all(new.get(k) == old.get(k) for k in place)
    return here and new.get("denoiser_fingerprint") != old.get("denoiser_fingerprint")


def is_stale(row: dict[str, Any]) -> bool:
    """Whether other weights lie now where the row's were; never for rows of none, or where nothing lies any more."""
    made_with = row.get("provenance", {})
    if made_with.get("denoiser") is None:
        return False
    path = Path(made_with["denoiser"])
    now = fingerprint_at(path)
    if now is None:
        return False
    if "denoiser_fingerprint" in made_with:
        return made_with["denoiser_fingerprint"] != now
    return _claimed(path) is not None  # version 0.1.0 measured no weights that a later one wrote


def current(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that may be shown: those whose weights are still the ones that lie where they were measured."""
    return [row for row in rows if not is_stale(row) and not _is_orphan(row)]


def _is_orphan(row: dict[str, Any]) -> bool:
    """A row whose weights were there when it was measured, by their fingerprint, and are no longer."""
    made_with = row.get("provenance", {})
    path = made_with.get("denoiser")
    return path is not None and "denoiser_fingerprint" in made_with and not Path(path).exists()


def fingerprint_at(directory: Path) -> str | None:
    """The fingerprint of the denoiser or diffusers pipeline in a directory; None where nothing can be loaded."""
    if not any((directory / name).is_file() for name in ("denoiser.json", "model_index.json")):
        return None  # a row may name any directory, and what lies below it may be a whole disk
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return _fingerprint_at(directory, tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@functools.lru_cache(256)
def _fingerprint_at(directory: Path, files: tuple) -> str | None:
    """`files` is what tells one content from another, within this process."""
    from pdistill import storage
    from pdistill.interop.diffusers import Pipeline, is_pipeline

    try:
        if is_pipeline(directory):
            return Pipeline.load(directory).fingerprint
        return storage.fingerprint_of(directory)
    except UserError:  # such as a part that is not registered here
        return _claimed(directory)


def _claimed(directory: Path) -> str | None:
    """The fingerprint that a denoiser's description holds, which version 0.1.0 did not write."""
    try:
        description = read_json(directory / "denoiser.json", cure="copy or train the denoiser again")
    except UserError:
        return None
    return description.get("fingerprint") if isinstance(description, dict) else None
