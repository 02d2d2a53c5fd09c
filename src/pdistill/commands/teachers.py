"""The teacher that `distill.py teacher=...` names, and whether it goes with the rest of the configuration.

A denoiser directory must be what the configuration says. A diffusers model brings its own network, noise schedule,
resolution and classes; `recipe` has set the keys that follow from it.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from pdistill.commands.identity import is_imported
from pdistill.commands.settings import Distill, Train
from pdistill.dataset import ImageSet, latents
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.interop.teachers import load_diffusers_teacher
from pdistill.parameterization import Parameterization


def given_teacher(settings: Distill) -> Denoiser | None:
    """The denoiser that `teacher` names; None for none. Raises UserError for what cannot be read."""
    if settings.teacher is None:
        return None
    if is_imported(settings.teacher):
        return load_diffusers_teacher(settings.teacher, settings.teacher_revision, settings.teacher_null_label)
    for key in ("teacher_revision", "teacher_null_label"):
        if getattr(settings, key) is not None:
            raise UserError(f"{key}={getattr(settings, key)} is for diffusers models, and {settings.teacher} is none")
    teacher, num_steps = Denoiser.load(Path(settings.teacher).expanduser()), settings.steps.plan[0]
    return teacher.for_steps(num_steps) if num_steps in teacher.step_counts else teacher


def predicting(teacher: Denoiser, parameterization: Parameterization) -> Denoiser:
    """A copy of the teacher whose output is read as another parameterization's; it is yet to be trained as such.

    Raises UserError where that has another number of channels.
    """
    student = copy.deepcopy(teacher)
    channels = teacher.image_shape[0]
    if parameterization.channels(channels) != teacher.parameterization.channels(channels):
        raise UserError(
            f"parameterization={parameterization.name} has {parameterization.channels(channels)} channels, and the "
            f"teacher's network gives {teacher.parameterization.channels(channels)}: use parameterization=v or x"
        )
    student.parameterization = parameterization
    return student


def images_of(settings: Train, teacher: Denoiser | None = None, device: torch.device | str = "cpu") -> ImageSet:
    """The configured dataset; with dataset=none samples of the teacher. Raises UserError for that without one."""
    data = instantiate(settings.dataset)
    if isinstance(data, ImageSet):
        return data
    if teacher is not None and teacher.codec is not None:
        raise UserError(
            f"dataset=none makes samples of classes, and teacher={settings.teacher} is conditioned on text: give "  # type: ignore[attr-defined]
            f"images with prompts, dataset=image_folder \"dataset.prompt='a photo of a {{label}}'\""
        )
    if teacher is None:
        raise UserError("dataset=none has no images to train a teacher on: give distill.py teacher=..., or a dataset")
    return data(teacher, settings.steps.plan[0], device)


def encoded_for(teacher: Denoiser | None, data: ImageSet, device: torch.device | str) -> ImageSet:
    """The data as the teacher sees it: of a text-to-image teacher latents, and prompts, which its directories keep."""
    codec: Any = None if teacher is None else teacher.codec
    if codec is None:
        return data
    encoded = latents.encoded(data, codec, device)
    codec.prompts = list(encoded.prompts or ())
    return encoded


def check_data(settings: Distill, teacher: Denoiser, data: ImageSet) -> None:
    """Raises UserError where a diffusers teacher and the data are of different sizes, channels, classes or words."""
    what = f"teacher={settings.teacher}"
    if teacher.codec is not None:
        latents.check_prompts(data)
    if teacher.pixel_shape != data.image_shape:
        words = ["x".join(map(str, shape)) for shape in (teacher.pixel_shape, data.image_shape)]
        raise UserError(
            f"{what} makes images of {words[0]} (channels, height, width) and dataset {data.name} holds {words[1]}: "
            f"leave dataset.image_size and dataset.image_channels out, or give another dataset"
        )
    if teacher.num_classes is None and settings.conditional and teacher.codec is None:
        raise UserError(f"conditional=true, and {what} knows no classes: leave it out")
    if teacher.num_classes is not None and teacher.num_classes != data.num_classes:
        raise UserError(
            f"{what} knows {teacher.num_classes} classes and dataset {data.name} has {data.num_classes or 'no'} "
            f"labels' classes: give the classes that it was trained on, or dataset=none for its own samples"
        )
