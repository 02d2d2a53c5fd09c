"""`pdistill estimate`: what a run of distill.py takes, before it is begun."""

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from pdistill import lora
from pdistill.commands.denoisers import new_denoiser
from pdistill.commands.recipe import read_recipe
from pdistill.commands.settings import Estimate, settings_of
from pdistill.commands.teachers import given_teacher, predicting
from pdistill.dataset import ImageSet
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.method.conversion import Conversion
from pdistill.method.guidance import Guidance
from pdistill.network import unet
from pdistill.processes import device_of
from pdistill.report.tables import aligned
from pdistill.sampling import Condition
from pdistill.steps import Stage
from pdistill.training.cost import PassCount
from pdistill.training.distillation import DistillationModule
from pdistill.training.fit import accumulated_batches
from pdistill.training.footprint import activations, flops
from pdistill.training.module import DenoisingModule, Recipe
from pdistill.training.settings import Optimization
from pdistill.training.teacher import TeacherModule

SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "imagenet64": (3, 64, 64)}  # of `pdistill.dataset`
ALL_DEVICES = 8  # where trainer.devices=-1, all of the machine's, and this one has no GPU
WARM_UP, TIMED = 2, 5  # updates
MIXED = ("bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Row:
    """A part of the run's work."""

    name: str
    updates: int | None
    images: float
    """That networks see, those of an update with gradients thrice."""
    batch_size: int = 1

    @property
    def passes(self) -> float:
        """Of batches."""
        return self.images / self.batch_size


def main(cfg: DictConfig) -> None:
    """Prints the estimate. Raises UserError where the configuration cannot be, or the images' shape is not known."""
    settings_of(cfg)  # refuses wrong values first
    read_recipe(cfg)
    settings: Estimate = settings_of(cfg)
    settings.start = None
    given = given_teacher(settings)
    if given is not None and given.codec is not None:
        raise UserError(f"teacher={settings.teacher} is of text to image, which is not estimated: docs/guidance.md")
    shape = shape_of(settings) if given is None else given.image_shape
    with torch.device("meta"):
        denoiser = new_denoiser(settings, _images(settings, shape)) if given is None else copy.deepcopy(given)
    rows = [*trainings(settings, given is None, denoiser), *measurements(settings)]
    print("\n".join(report(settings, denoiser.to("meta"), rows, devices_of(settings))))


def shape_of(settings: Estimate) -> tuple[int, int, int]:
    """(C, H, W) of the images, as far as the settings tell."""
    if settings.image_shape is not None:
        channels, height, width = settings.image_shape
        return channels, height, width
    name = str(settings.dataset.get("_target_", "")).rpartition(".")[2]
    size = settings.dataset.get("image_size")
    if name not in SHAPES and size is None:
        raise UserError("the settings of this dataset do not tell its images' shape: give image_shape=[3,32,32]")
    return SHAPES.get(name) or (settings.dataset.get("image_channels", 3), size, size)


def _images(settings: Estimate, shape: tuple[int, int, int]) -> ImageSet:
    """One image in the place of the data."""
    label = torch.zeros(1, dtype=torch.long, device="cpu")
    image = torch.zeros(1, *shape, dtype=torch.uint8, device="cpu")
    return ImageSet("the data", image, label, classes=settings.num_classes)


def devices_of(settings: Estimate) -> int:
    """That share the work."""
    devices = settings.trainer["devices"]
    return (torch.cuda.device_count() or ALL_DEVICES) if devices == -1 else devices


def trainings(settings: Estimate, trains_teacher: bool, denoiser: Denoiser) -> list[Row]:
    """The teacher's, if it is trained, and each stage's: passes counted on a small network of the same kind."""
    small = _small(settings, denoiser)
    rows = []

    def add(name: str, module: DenoisingModule, section: Optimization, updates: int) -> None:
        images = updates * section.batch_size * passes_of_update(module)
        rows.append(Row(name, updates, images, section.batch_size))

    def recipe(section: Optimization) -> Recipe:
        return Recipe(section, instantiate(settings.weighting))

    if trains_teacher:
        module = TeacherModule(copy.deepcopy(small), recipe(settings.training))
        add("teacher", module, settings.training, settings.training.updates)
    parameterization = instantiate(settings.parameterization)
    converts = not trains_teacher and denoiser.parameterization.name != parameterization.name
    every_time: list[tuple[Any, Any, Denoiser]] = []
    if converts:
        every_time.append((Conversion(), settings.conversion, predicting(small, parameterization)))
    if settings.guidance is not None and denoiser.guidance is None:
        every_time.append((Guidance(*settings.guidance_range), settings.guiding, small))
    for method, section, start in every_time:
        (stage,) = method.stages(settings.steps)
        stage = replace(stage, updates=section.updates or stage.updates)
        module = DistillationModule(copy.deepcopy(small), stage, recipe(section), method, start=start)
        add(stage.name, module, section, stage.updates)
        small = module.student
    method = instantiate(settings.method)
    stages: list[Stage] = method.stages(settings.steps, settings.distillation.max_teacher_steps)
    section, counted = settings.distillation, {}
    for stage in stages:
        kind = stage.teacher_steps, stage.counts
        if kind not in counted:
            module = DistillationModule(copy.deepcopy(small), stage, recipe(section), method)
            counted[kind] = passes_of_update(module)
        images = stage.updates * section.batch_size * counted[kind]
        rows.append(Row(stage.name, stage.updates, images, section.batch_size))
    return rows


def _small(settings: Estimate, like: Denoiser) -> Denoiser:
    """A denoiser that is evaluated as often as the real one."""
    channels, classes = like.image_shape[0], like.num_classes
    names = {} if classes is None else {"num_classes": classes + (like.null_label is not None)}
    network = unet(8, channels, like.parameterization.channels(channels), 32, 64, [1], 1, [], **names)
    small = Denoiser(network, like.parameterization, instantiate(settings.schedule), null_label=like.null_label)
    small.num_steps, small.sampler, small.guidance = like.num_steps, like.sampler, like.guidance
    return small


def passes_of_update(module: DenoisingModule) -> float:
    """Network passes of one update: an evaluation is one, one with gradients three."""
    image = torch.zeros(2, *module.denoiser.image_shape)
    count = PassCount(module)
    module.losses({"image": image, "label": torch.zeros(2, dtype=torch.long)})
    count.close()
    return count.images / len(image)


def measurements(settings: Estimate) -> list[Row]:
    """The samples that metrics take of every stage."""
    if settings.metrics.extractor is None:
        return []
    curve = settings.metrics.teacher_curve or {"steps": [], "samplers": []}
    steps = sum(settings.steps.plan) + sum(curve["steps"]) * len(curve["samplers"])
    return [Row("samples for metrics", None, settings.metrics.num_samples * steps)]


def report(settings: Estimate, denoiser: Denoiser, rows: list[Row], devices: int) -> list[str]:
    """The lines to print."""
    of_image = flops(lambda images: evaluated(denoiser, images))
    rate = measured(settings, denoiser) if settings.measure else settings.images_per_second
    total = sum(row.images for row in rows)
    lines = [["", "updates", "network passes", "PFLOP", *(["hours"] if rate else [])]]
    for row in [*rows, Row("together", None, total)]:
        counts = [f"{row.updates:,}", f"{row.passes:,.0f}"] if row.updates else ["", ""]
        cells = [row.name, *counts, in_words(of_image * row.images / 1e15)]
        lines.append(cells + ([in_words(row.images / (3 * rate * devices) / 3600)] if rate else []))
    parameters = sum(p.numel() for p in denoiser.network.parameters())
    first = (
        f"{parameters / 1e6:.1f} M parameters, images {denoiser.image_shape}, {of_image / 1e9:.3g} GFLOP an evaluation"
    )
    where = f"{devices} device{'s' * (devices > 1)} with trainer.precision={settings.trainer['precision']}"
    found = "measured here" if settings.measure else "as given"
    last = "hours: give images_per_second=<of one device in training the teacher>, or measure=true to find it here"
    if rate:
        last = f"hours: one device trains the teacher with {rate:.4g} images/s ({found}), and {devices} share the work"
    return [f"{first}; {where}", "", *aligned(lines), "", *memory(settings, denoiser, devices), last]


def in_words(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def memory(settings: Estimate, denoiser: Denoiser, devices: int) -> list[str]:
    """A line on what a device holds in distillation."""
    section, mixed = settings.distillation, settings.trainer["precision"] in MIXED
    student = copy.deepcopy(denoiser)
    if settings.lora.rank is not None:
        lora.add(student, settings.lora.rank)
    lora.freeze_the_others(student)
    once, image = activations(student.network, lambda images: evaluated(student, images), mixed)
    total = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    copies = 2 + len(section.decays(100))  # student, teacher, averages
    fixed = 4 * (copies * total + 3 * trained) + once  # gradients and Adam's two averages
    least, most = settings.trainer.get("accumulate_grad_batches", 1), settings.max_batch_per_device
    parts = accumulated_batches(section.batch_size, devices, least, most, "distillation.batch_size")
    batch = section.batch_size // (devices * parts)
    return [
        f"memory of distillation: {fixed / 1e9:.2f} GB + {image / 1e6:.1f} MB an image, so "
        f"{(fixed + batch * image) / 1e9:.2f} GB for the {batch} images that a device takes at once"
    ]


def evaluated(denoiser: Denoiser, images: int) -> None:
    """Evaluates the network on the meta device."""
    z, t = torch.empty(images, *denoiser.image_shape), torch.empty(images)
    condition: Condition = None
    if denoiser.num_classes is not None:
        condition = torch.empty(images, dtype=torch.long)
    denoiser.output(z, t, condition)


def measured(settings: Estimate, like: Denoiser) -> float:
    """Images per second of the teacher's training on this machine's device, by a few updates with noise as data."""
    device = device_of("cpu" if settings.trainer["accelerator"] == "cpu" else "auto")
    network = copy.deepcopy(like.network).to_empty(device=device)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    denoiser = Denoiser(network, like.parameterization, instantiate(settings.schedule), image_shape=like.image_shape)
    module = TeacherModule(denoiser, Recipe(settings.training, instantiate(settings.weighting)))
    optimizer = instantiate(settings.optimizer)(denoiser.parameters(), settings.training)
    least, most = settings.trainer.get("accumulate_grad_batches", 1), settings.max_batch_per_device
    batch = settings.training.batch_size // accumulated_batches(settings.training.batch_size, 1, least, most)
    data = {"image": torch.randn(batch, *like.image_shape, device=device)}
    data["label"] = torch.zeros(batch, dtype=torch.long, device=device)
    enabled = settings.trainer["precision"] in MIXED
    begun = 0.0
    for k in range(WARM_UP + TIMED):
        if k == WARM_UP:
            _wait_for(device)
            begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            losses, _ = module.losses(data)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait_for(device)
    return TIMED * batch / (time.perf_counter() - begun)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
