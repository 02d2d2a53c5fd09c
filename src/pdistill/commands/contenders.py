"""What evaluate measures: a run, a denoiser by itself or a diffusers pipeline; and against which data."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate

from pdistill import registry
from pdistill.commands import run_directory
from pdistill.commands.denoisers import check_guidance
from pdistill.commands.settings import Evaluate
from pdistill.dataset import ImageSet, digits
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError, first_line
from pdistill.interop.diffusers import Pipeline, is_pipeline
from pdistill.processes import is_main
from pdistill.sampling import sampler_of
from pdistill.steps import TEACHERS

Model = Denoiser | Pipeline


@dataclass(frozen=True)
class Contender:
    """One row to measure; rows of one `label` are one curve."""

    label: str
    path: str
    sampler: str
    num_steps: int
    guidance: float | None = None
    """None: the denoiser's own."""


def made(part: Any) -> Any:
    """What a node of the configuration makes; a part that a program gave is that itself."""
    return instantiate(part) if isinstance(part, Mapping) else part


def load(path: str) -> Model:
    """The denoiser or the diffusers pipeline in a directory."""
    return Pipeline.load(path) if is_pipeline(Path(path)) else Denoiser.load(path)


def place_of(settings: Evaluate) -> Path:
    """The directory that `denoiser` names: a run, a denoiser, or a pipeline; of a stage, its denoiser."""
    if settings.denoiser is None:
        raise UserError("denoiser=<directory> is missing, e.g. denoiser=outputs/demo/steps-0004/denoiser")
    path = Path(settings.denoiser).expanduser()
    if not path.is_dir():
        raise UserError(
            f"denoiser={settings.denoiser} is no directory: give a run, e.g. outputs/demo, or a denoiser, e.g. "
            f"outputs/demo/steps-0004/denoiser"
        )
    return path / "denoiser" if (path / "denoiser" / "denoiser.json").exists() else path


def contenders(settings: Evaluate, load: Callable[[str], Model]) -> list[Contender]:
    """What is to be measured: a denoiser or a diffusers pipeline at `num_steps` by `samplers`; of a run directory each
    student at its own step count and the teacher, as far as `baselines` goes, at all of these. Each is measured at
    every `guidance`, by default at its own, and the baselines at that of what they are compared with.

    Raises UserError where that is nothing, or cannot be.
    """
    path = place_of(settings)
    students = sorted(p for p in path.glob("steps-*/denoiser") if re.fullmatch(r"steps-\d+", p.parent.name))
    if not students and (path / "teacher" / "denoiser").exists():
        path = path / "teacher" / "denoiser"  # of a run that has no students, or not yet
    if students:
        default = [int(student.parent.name.removeprefix("steps-")) for student in students]
        own = [sampler_of(load(str(p))) for p in students]
        found = [Contender("distilled", str(p), s, n) for p, s, n in zip(students, own, default, strict=True)]
        teacher = path / "teacher" / "denoiser"
    else:
        default = getattr(load(str(path)), "step_counts", [])
        found, teacher = [], path.parent.parent / "teacher" / "denoiser"
    steps = settings.step_counts or default
    if not steps:
        raise UserError(f"denoiser={path} is made for no step count of its own: give num_steps=[...]")
    if not students:
        _check_steps(load(str(path)), steps)
    if is_pipeline(path):
        pipeline: Any = load(str(path))
        for n in steps:
            pipeline.check_steps(n)
        found += [Contender(f"{path.name}, own scheduler", str(path), "own", n) for n in steps]
    elif not students:
        label = "teacher" if path.parent.name == "teacher" else "denoiser"
        names = _fitting(load(str(path)), settings, "samplers") or [sampler_of(load(str(path)))]
        found += [Contender(f"{label}, {name}", str(path), name, n) for name in names for n in steps]
    if settings.baseline_names and not teacher.exists():
        raise UserError(f"baselines={settings.baselines} are samplers of the teacher, and there is none at {teacher}")
    baselines = []
    if settings.baseline_names:
        names = _fitting(load(str(teacher)), settings, "baselines")
        baselines = [Contender(f"teacher, {name}", str(teacher), name, n) for name in names for n in steps]
    values = settings.guidance_values
    taught: float = getattr(load(found[0].path), "default_guidance", 1.0)
    of_baselines = [taught] if values == [None] and taught != 1 else values
    found = [_guided(c, g) for g in values for c in found] + [_guided(c, g) for g in of_baselines for c in baselines]
    for contender in found:
        _check_guidance(load(contender.path), contender)
    return list(dict.fromkeys(found))


def _fitting(model: Model, settings: Evaluate, key: str) -> list[str]:
    """The samplers that a key lists; of all, those that the model takes. Raises UserError for one that it does not."""
    names, found = settings.sampler_names if key == "samplers" else settings.baseline_names, []
    for name in names:
        try:
            found.append(sampler_of(model, name))
        except ValueError as error:
            if getattr(settings, key) != "all":
                raise UserError(f"{key}={getattr(settings, key)}: {error}") from error
    return found


def _guided(contender: Contender, guidance: float | None) -> Contender:
    if guidance is None:
        return contender
    return replace(contender, label=f"{contender.label}, guidance {guidance:g}", guidance=guidance)


def _check_guidance(model: Model, contender: Contender) -> None:
    if contender.guidance is None:
        return
    given = f"guidance={contender.guidance:g}"
    if isinstance(model, Pipeline):
        raise UserError(f"{given}: {contender.path} is an unconditional pipeline of diffusers: leave it out")
    check_guidance(model, contender.guidance, given, contender.path)


def _check_steps(model: Model, steps: list[int]) -> None:
    """Raises UserError for step counts that a student of several does not know."""
    try:
        for n in steps:
            getattr(model, "for_steps", lambda n: None)(n)
    except ValueError as error:
        raise UserError(f"num_steps={steps}: {error}") from error


def run_of(path: Path) -> Path | None:
    """The run directory that `path` is, or in whose stages it lies."""
    candidates = [path]
    stages = "|".join((*TEACHERS, r"parallel-\d+", r"steps-\d+"))
    if path.name == "denoiser" and re.fullmatch(stages, path.resolve().parent.name):
        candidates.append(path.resolve().parents[1])
    return next((c for c in candidates if (c / "config.yaml").exists() and (c / "teacher").exists()), None)


def reference_set(settings: Evaluate, image_shape: tuple[int, int, int]) -> ImageSet:
    """The dataset to compare with, or `num_reference` of its images, evenly spread.

    It is the one asked for, or the run's own, or digits where the shapes fit. Raises UserError where there is none.
    """
    data = _whole_reference_set(settings, image_shape)
    if data.image_shape != image_shape:
        raise UserError(
            f"denoiser={settings.denoiser} makes images of shape {image_shape} and {data.name} holds "
            f"{data.image_shape}: give the dataset that it was trained on, dataset=..."
        )
    if settings.num_reference is None:
        return data
    if settings.num_reference > len(data.images):
        raise UserError(
            f"num_reference={settings.num_reference} must be 2 to {len(data.images)}, the images of {data.name}, or "
            f"null for all of them"
        )
    index = torch.from_numpy(np.linspace(0, len(data.images) - 1, settings.num_reference).round().astype(np.int64))
    labels = None if data.labels is None else data.labels[index]
    return ImageSet(f"{data.name}, {settings.num_reference} images", data.images[index], labels, data.flips)


def _whole_reference_set(settings: Evaluate, image_shape: tuple[int, int, int]) -> ImageSet:
    if settings.dataset is not None:
        data = made(settings.dataset)
        if not isinstance(data, ImageSet):
            raise UserError("dataset=none is of a run's teacher: leave it out, and a run is measured as it was")
        return data
    run = run_of(place_of(settings))
    if run is not None:
        return dataset_of_run(run)
    data = digits()
    if data.image_shape != image_shape:
        raise UserError(
            f"denoiser={settings.denoiser} lies in no run that would name its dataset, and makes images of shape "
            f"{image_shape}: give the dataset that it was trained on, dataset=..."
        )
    if is_main():
        print(f"denoiser={settings.denoiser} names no dataset: measured against digits, as dataset=digits would say")
    return data


def dataset_of_run(run: Path) -> ImageSet:
    """A run's own dataset, by its config.yaml. Raises UserError where it is not to be made here.

    Nothing is imported because the file says so: the dataset must be built in or registered.
    """
    whole = run_directory.config_of(run)
    config = whole.get("dataset")
    config = config if isinstance(config, dict) else {}
    target = str(config.get("_target_"))
    part = _known_datasets().get(target)
    if part is None:
        raise UserError(
            f"{run}/config.yaml names the dataset {target}, which is neither built in nor registered: give "
            f"imports=[<the module that registers it>], or dataset=..."
        )
    try:
        given = {key: value for key, value in config.items() if not str(key).startswith("_")}
        if config.get("_partial_"):  # dataset=none: of the samples of the run's teacher
            part = functools.partial(part, Denoiser.load(run / "teacher" / "denoiser"), whole["steps"]["plan"][0])
        data = part(**given)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{run}/config.yaml names the dataset {target} with arguments that it does not take "
            f"({first_line(error)}): give dataset=..."
        ) from error
    before = run_directory.facts_of(run).get("data")
    if before not in (None, data.fingerprint) and is_main():
        print(f"warning: the images of {data.name} have changed since {run} was trained on them")
    return data


def _known_datasets() -> dict[str, Callable[..., ImageSet]]:
    """Built-in and registered datasets by their import paths, as configurations name them."""
    known = {}
    for name in registry.names("dataset"):
        part = registry.find("dataset", name)
        known[f"{getattr(part, '__module__', '')}.{getattr(part, '__qualname__', name)}"] = part
        if place := registry.BUILT_IN["dataset"].get(name):
            known[place.replace(":", ".")] = part
    return known
