"""What a run of distill.py is to do, found out and checked before any work starts."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hydra.utils import instantiate

from pdistill import lora
from pdistill import network as networks
from pdistill.commands.denoisers import NEARLY_ZERO_SNR, check_stable, new_student
from pdistill.commands.identity import is_imported
from pdistill.commands.job import trainer_of
from pdistill.commands.settings import Distill, Train
from pdistill.commands.teachers import encoded_for, given_teacher, images_of
from pdistill.dataset import ImageSet
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.method import check_sampler, sampler_taught
from pdistill.sampling import DDIM, sampler_of
from pdistill.schedule import DiscreteBetaSchedule
from pdistill.steps import Stage
from pdistill.training import execution
from pdistill.training.fit import accumulated_batches
from pdistill.training.settings import Optimization


@dataclass(frozen=True)
class Plan:
    """Of a run."""

    method: Any
    stages: list[Stage]
    given: Denoiser | None
    """The teacher; None where it is yet to be trained."""
    template: Denoiser
    """What students are like, untrained."""
    data: ImageSet
    converts: bool
    """Whether a stage makes the teacher predict what its students do."""
    guides: bool
    """Whether a stage teaches its guidance."""


def planned(settings: Distill) -> Plan:
    """Raises UserError for whatever does not go together."""
    method = instantiate(settings.method)
    stages = method.stages(settings.steps, settings.distillation.max_teacher_steps)
    given = given_teacher(settings)
    check = getattr(method, "check", lambda teacher: None)
    if given is not None:
        check(given)
        check_sampler(method, given)
        settings.metrics.check_samplers(partial(sampler_of, given))
    guiding = [] if settings.guidance is None else [settings.guiding]
    first = settings.conversion if given else settings.training
    check_batches(settings, [first, *guiding, settings.distillation])
    device = trainer_of(settings).strategy.root_device
    data = images_of(settings, given, device)
    template = new_student(settings, data, given)
    check_stable(settings, template, floor=torch.inf if is_imported(settings.teacher) else NEARLY_ZERO_SNR)
    if given is None:
        check(template)
    converts = given is not None and given.architecture["parameterization"] != template.architecture["parameterization"]
    guides = _guides(settings, given or template)
    _check_text_to_image(settings, method, template)
    execution.check(settings, template.network)
    if settings.lora.rank is not None:
        lora.check(settings.lora.rank, template.network)
        if any(stage.counts for stage in stages):
            raise UserError(
                f"lora.rank={settings.lora.rank} keeps the last layer, which this method trains: leave it out"
            )
    return Plan(method, stages, given, template, encoded_for(given, data, device), converts, guides)


def check_batches(settings: Train, sections: list[Optimization]) -> None:
    """Batches that divide among the devices, metrics that can be measured, and a trainer that this machine can run."""
    settings.metrics.check_samplers()
    trainer = trainer_of(settings)
    least, most = trainer.accumulate_grad_batches, settings.max_batch_per_device
    for section in sections:
        accumulated_batches(section.batch_size, trainer.world_size, least, most, f"{section.section}.batch_size")


def _guides(settings: Distill, teacher: Denoiser) -> bool:
    """Whether students are to be taught guidance that the teacher has not been. Raises UserError where it cannot be."""
    if settings.guidance is None:
        return False
    if settings.start is not None and settings.teacher is not None and teacher.guidance is None:
        raise UserError(
            f"start={settings.start} is what the first student starts from, and with guidance={settings.guidance} that "
            f"is the student of the stage before: leave start out"
        )
    if teacher.guidance is not None:
        if teacher.guidance != settings.guidance_range:
            raise UserError(
                f"guidance={settings.guidance}, and teacher={settings.teacher} was taught {list(teacher.guidance)}: "
                f"leave guidance out, or give the teacher that it learned from"
            )
        return False
    if teacher.num_steps is not None:
        raise UserError(
            f"guidance={settings.guidance} is learned from a teacher that knows every time, and teacher="
            f"{settings.teacher} was distilled for {teacher.num_steps} steps: give the teacher that it came from"
        )
    if not teacher.has_null_condition:
        raise UserError(
            f"guidance={settings.guidance} needs a teacher that knows what no label means, and teacher="
            f"{settings.teacher} has no null label: give one trained with label_dropout, or, of a diffusers model, "
            f"teacher_null_label=<its last class>"
        )
    low, high = settings.guidance_range
    if low < high:
        networks.check_place_for_guidance(teacher.network)
    return True


def _check_text_to_image(settings: Distill, method: Any, teacher: Denoiser) -> None:
    """Refuses students that diffusers' pipeline does not draw with, and steps between times that are the same."""
    if teacher.codec is None or not isinstance(teacher.schedule, DiscreteBetaSchedule):
        return
    if sampler_taught(method) != DDIM:
        raise UserError(
            f"teacher={settings.teacher} makes images from text, and its students are drawn by a pipeline which "
            f"has no sampler {sampler_taught(method)}: use method.stochastic=false"
        )
    steps, known = max(*settings.steps.plan, *getattr(method, "range", ())), len(teacher.schedule.alphas_cumprod)
    if steps > known:
        raise UserError(
            f"steps.plan or the method asks for {steps} steps, and the teacher knows {known} times: use no more, with "
            f"method=multistep_consistency method.teacher_steps_to={known}"
        )
