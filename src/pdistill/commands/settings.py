"""The settings of every command: what `--help` shows, what Hydra checks the type of, and what is refused at once.

Importing this module registers them with Hydra; `hydra_plugins/pdistill_settings.py` does so for whoever composes
conf/.
"""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from pdistill import registry
from pdistill.checks import number, whole
from pdistill.commands import launching  # noqa: F401  # its resolver is conf/trainer/slurm.yaml's
from pdistill.errors import UserError
from pdistill.metrics.settings import LEAST_EXTRAPOLATED, Metrics, are_step_counts
from pdistill.training.settings import Conversion, Distillation, Execution, Guiding, Lora, Steps, Training

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # weights, noise and losses are float32 throughout


def check_trainer(trainer: dict[str, Any]) -> None:
    """The arguments of Lightning's Trainer that the project relies on; Lightning itself checks the others."""
    if trainer["devices"] != -1:
        whole("trainer.devices", trainer["devices"], 1)
    for key in ("num_nodes", "accumulate_grad_batches", "log_every_n_steps"):
        whole(f"trainer.{key}", trainer.get(key, 1), 1)
    if trainer["precision"] not in PRECISIONS:
        raise UserError(f"trainer.precision={trainer['precision']} must be one of {', '.join(PRECISIONS)}")
    if str(trainer.get("strategy")) in ("fsdp", "fsdp_cpu_offload"):
        raise UserError(f"trainer.strategy={trainer['strategy']} is not supported: use trainer=fsdp, which is FSDP2")
    if trainer.get("strategy") == "fsdp2" and trainer["precision"] == "16-mixed":
        raise UserError("trainer.precision=16-mixed is not supported with trainer=fsdp: use bf16-mixed or 32-true")


@dataclass
class Train(Execution):
    """Settings of a run that trains a teacher."""

    name: str = "${run_name:}"
    """Of the run's directory; by default made of what was typed. In a sweep the prefix of each job's name."""
    output_root: str = "outputs"
    """The directory of run directories."""
    seed: int = 0
    """Of everything that is random."""
    overwrite: bool = False
    """Delete what stands in the run's directory and start again."""
    imports: list[str] = field(default_factory=list)
    """Modules to import first, which register parts of their own: docs/extending.md."""
    num_workers: int = 0
    """Processes that make batches."""
    checkpoint_every_n_updates: int = 250
    """Updates that a crash may cost at most."""
    samples_every_n_updates: int | None = None
    """Draw a few samples every so many updates, for the loggers and the report's film strips; null: do not."""
    conditional: bool = False
    """Class-conditional; the dataset must have labels."""
    label_dropout: float = 0.0
    """Share of labels hidden from a conditional network, for `sample.py guidance=...`."""
    max_batch_per_device: int | None = None
    """More images than this are taken in several parts, their gradients added up; null: no limit."""
    skip_nonfinite: bool = False
    """Leave out updates whose gradient is not finite, as the authors' code can; false: the first ends the run."""
    skip_nonfinite_in_a_row: int = 30
    """With skip_nonfinite: so many in a row end the run."""
    start: str | None = None
    """A denoiser directory whose weights the teacher's training starts from; with teacher=..., the first student's."""
    allow_unstable: bool = False
    """Go on with a parameterization that cannot work with the schedule (eps at zero SNR)."""
    dataset: Any = MISSING
    network: Any = MISSING
    schedule: Any = MISSING
    parameterization: Any = MISSING
    weighting: Any = MISSING
    optimizer: Any = MISSING
    callbacks: Any = None
    logger: Any = None
    steps: Steps = field(default_factory=Steps)
    method: Any = MISSING
    metrics: Metrics = field(default_factory=Metrics)
    trainer: Any = MISSING
    training: Training = field(default_factory=Training)
    distillation: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("seed", self.seed, 0)
        whole("num_workers", self.num_workers, 0)
        whole("checkpoint_every_n_updates", self.checkpoint_every_n_updates, 1)
        if self.samples_every_n_updates is not None:
            whole("samples_every_n_updates", self.samples_every_n_updates, 1)
        if self.max_batch_per_device is not None:
            whole("max_batch_per_device", self.max_batch_per_device, 1)
        whole("skip_nonfinite_in_a_row", self.skip_nonfinite_in_a_row, 1)
        number("label_dropout", self.label_dropout, 1)
        if self.label_dropout and not self.conditional:
            raise UserError(f"label_dropout={self.label_dropout} hides labels that nobody reads: add conditional=true")
        check_trainer(self.trainer)
        for key in ("compile", "channels_last"):
            if getattr(self, key, False) and self.trainer.get("strategy") == "fsdp2":
                raise UserError(f"{key}=true is not supported with trainer=fsdp: leave it out, or use trainer=ddp")


@dataclass
class Distill(Train):
    """Settings of a run that trains a teacher, or takes one, and distils it stage by stage."""

    teacher: str | None = None
    """A denoiser directory, a diffusers folder, or a model on the hub as owner/name; null: train one first."""
    teacher_revision: str | None = None
    """Of a model on the hub: a branch, tag or commit."""
    teacher_null_label: int | None = None
    """The class that stands for none in a diffusers model: its last one, where it was trained so."""
    conversion: Conversion = field(default_factory=Conversion)
    guidance: Any = None
    """[1,5], or one value: the classifier-free guidance that students learn, at one evaluation a step; 1 is plain, 0
    ignores the label."""
    guiding: Guiding = field(default_factory=Guiding)
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("teacher_revision", "teacher_null_label"):
            if getattr(self, key) is not None and self.teacher is None:
                raise UserError(f"{key}={getattr(self, key)} is of a teacher: give teacher=<a diffusers model>")
        if self.metrics.extractor is None and len(self.distillation.ema_decays or []) > 1:
            raise UserError(
                f"distillation.ema_decays={self.distillation.ema_decays} chooses the best by the metric, and "
                f"metrics=none measures nothing: give metrics=classifier or another, or one decay"
            )
        if self.teacher_null_label is not None:
            whole("teacher_null_label", self.teacher_null_label, 1)
        if self.guidance is not None:
            self._check_guidance()

    def _check_guidance(self) -> None:
        low, high = self.guidance_range if _are_two_numbers(self.guidance_range) else (-1.0, -1.0)
        if low < 0 or (isinstance(self.guidance, list) and low >= high):
            raise UserError(
                f"guidance={self.guidance} must be a range [low, high] with 0 <= low < high, e.g. guidance=[1,5], or "
                f"one value, e.g. guidance=2"
            )
        if self.teacher is None and not self.label_dropout:
            raise UserError(
                f"guidance={self.guidance} needs a teacher that knows what no label means: add conditional=true "
                f"label_dropout=0.1"
            )

    @property
    def guidance_range(self) -> Any:
        """(low, high), equal for one value; None for none."""
        if self.guidance is None:
            return None
        return tuple(self.guidance) if isinstance(self.guidance, list) else (self.guidance, self.guidance)


@dataclass
class Estimate(Distill):
    """Settings of an estimate of a run, which are the run's and these."""

    images_per_second: float | None = None
    """Images that one device trains the teacher with in a second, as a run's log says; null: hours are not told."""
    measure: bool = False
    """Find images_per_second by a few updates on this machine."""
    image_shape: Any = None
    """[3,32,32]: of the images, where the dataset's settings do not tell."""
    num_classes: int = 1000
    """Of conditional=true."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_second is not None:
            number("images_per_second", self.images_per_second)
            if self.measure:
                raise UserError(f"images_per_second={self.images_per_second} and measure=true: give one of them")
        whole("num_classes", self.num_classes, 1)
        shape = self.image_shape
        if shape is not None and not (isinstance(shape, list) and len(shape) == 3 and are_step_counts(shape)):
            raise UserError(f"image_shape={shape} must be channels, height and width, e.g. image_shape=[3,32,32]")


def _are_two_numbers(values: Any) -> bool:
    return len(values) == 2 and _are_numbers(values)


def _are_numbers(values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


@dataclass
class Sample:
    """Settings of pictures from a denoiser."""

    denoiser: str | None = None
    """A directory that holds denoiser.json."""
    num_steps: int | None = None
    """Network evaluations of an image; by default what the denoiser was distilled for."""
    num_images: int = 64
    seed: int = 0
    """The same seed gives the same pictures, whatever the batch size."""
    label: Any = None
    """Of a class-conditional denoiser: 3, or [1,2] in turn; by default all classes in turn."""
    prompt: Any = None
    """Of a text-to-image denoiser: one, or a list in turn; by default those that it was distilled with, in turn."""
    guidance: float | None = None
    """Of a denoiser trained with label_dropout, or taught guidance: 0 ignores the label, 1 is plain and the default, 2
    and more emphasise it."""
    sampler: str | None = None
    """ddim, ancestral, stochastic, dpmsolver++2m, dpmsolver++3m, unipc, deis, heun, or a registered one; by default
    stochastic for students that were distilled for it, and ddim for all others."""
    variance: Any = "large"
    """Of the ancestral sampler: large, small, or a fraction between."""
    clip: bool = True
    """Clamp every prediction to [-1, 1], as the paper does."""
    batch_size: int = 250
    device: str = "auto"
    """cpu, cuda, ...; auto: CUDA where there is one."""
    output: str | None = None
    """The grid's file; by default <output_root>/samples/<denoiser>-<steps>-steps-seed-<seed>.png."""
    output_root: str = "outputs"
    individual: bool = False
    """Also every picture by itself, in a folder beside the grid."""
    imports: list[str] = field(default_factory=list)
    """Modules to import first, which register parts of their own: docs/extending.md."""

    def __post_init__(self) -> None:
        for key, least in {"num_images": 1, "batch_size": 1, "seed": 0}.items():
            whole(key, getattr(self, key), least)
        if self.num_steps is not None:
            whole("num_steps", self.num_steps, 1)
        labels = self.label if isinstance(self.label, list) else [self.label]
        if self.label is not None and not (labels and all(isinstance(k, int) and k >= 0 for k in labels)):
            raise UserError(f"label={self.label} must be a class, or classes in turn, e.g. label=3 or label=[1,2]")
        prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if self.prompt is not None and not (prompts and all(isinstance(p, str) for p in prompts)):
            raise UserError(f"prompt={self.prompt} must be a text, or a list of texts, e.g. prompt='a red chair'")
        if self.output is not None and not self.output.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
            raise UserError(f"output={self.output} must end in .png, .jpg or .webp, e.g. output={self.output}.png")


@dataclass
class Evaluate:
    """Settings of the metrics of a run, a denoiser, or a diffusers pipeline."""

    denoiser: str | None = None
    """A run's directory, one that holds denoiser.json, or one that holds model_index.json."""
    num_steps: Any = None
    """4, or [1,2,4,8]: network evaluations of an image; by default what the denoisers were distilled for."""
    steps: Any = None
    """The same by its former name."""
    samplers: Any = None
    """One or a list of ddim, ancestral, stochastic, dpmsolver++2m, dpmsolver++3m, unipc, deis, heun, registered ones;
    all: those that the denoiser takes; by default its own."""
    baselines: Any = None
    """Samplers of the run's teacher to measure too, in as many steps and at the same guidance; or all."""
    guidance: Any = None
    """2, or [1,2,4]: classifier-free guidance to measure each denoiser at; null: its own, 1, or what it was taught."""
    bootstrap: int = 20
    """Resamplings of the samples, for FID's interval; 0 for none."""
    extrapolate: bool = False
    """Also FID-infinity, at 15 times FID's own time."""
    num_reference: int | None = None
    """Images of the dataset to compare with, evenly spread; null: all."""
    seed: int = 0
    """Of the samples."""
    batch_size: int = 250
    """Images drawn at once."""
    device: str = "auto"
    """cpu, cuda, ...; auto: CUDA where there is one."""
    devices: int = 1
    """How many to share the work; the metrics are the same."""
    name: str | None = None
    """Of the file of metrics; by default <run>, or <run>-<stage>."""
    output_root: str = "outputs"
    """The metrics go to <output_root>/evaluations; what stands there and was measured alike is kept."""
    imports: list[str] = field(default_factory=list)
    """Modules to import first, which register parts of their own: docs/extending.md."""
    dataset: Any = None
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        for key, least in {"bootstrap": 0, "seed": 0, "batch_size": 1, "devices": 1}.items():
            whole(key, getattr(self, key), least)
        if self.num_reference is not None:
            whole("num_reference", self.num_reference, 2)
        if self.num_steps is not None and self.steps is not None:
            raise UserError(f"steps={self.steps} is the former name of num_steps={self.num_steps}: give one of them")
        if self.extrapolate and self.metrics.num_samples < LEAST_EXTRAPOLATED:
            raise UserError(
                f"metrics.num_samples={self.metrics.num_samples} must be at least {LEAST_EXTRAPOLATED} "
                f"with extrapolate=true"
            )
        if self.name is not None and (not re.fullmatch(r"[\w.+-]+", self.name) or self.name.startswith(".")):
            raise UserError(f"name={self.name} must be one file name of letters, digits and . + - _, e.g. name=first")
        _ = self.step_counts, self.sampler_names, self.baseline_names, self.guidance_values

    @property
    def step_counts(self) -> list[int]:
        """What `num_steps`, or its former name, lists. Raises UserError where that are no step counts."""
        key = "num_steps" if self.steps is None else "steps"
        value = getattr(self, key)
        if value is None:
            return []
        counts = value if isinstance(value, list) else [value]
        if not are_step_counts(counts):
            raise UserError(f"{key}={value} must be whole numbers, at least 1, e.g. num_steps=4 or num_steps=[1,2,4,8]")
        return counts

    @property
    def guidance_values(self) -> list[float | None]:
        """What `guidance` lists; [None], the denoisers' own, for null. Raises UserError for other than numbers >= 0."""
        if self.guidance is None:
            return [None]
        values = self.guidance if isinstance(self.guidance, list) else [self.guidance]
        if not (values and _are_numbers(values) and min(values) >= 0):
            raise UserError(
                f"guidance={self.guidance} must be numbers, at least 0, e.g. guidance=2 or guidance=[1,2,4]"
            )
        return [float(value) for value in values]

    @property
    def sampler_names(self) -> list[str]:
        """What `samplers` lists; nothing by default. Raises UserError for names that are not known."""
        return self._names("samplers")

    @property
    def baseline_names(self) -> list[str]:
        """What `baselines` lists. Raises UserError for names that are not known."""
        return self._names("baselines")

    def _names(self, key: str) -> list[str]:
        value, known = getattr(self, key), registry.names("sampler")
        names = known if value == "all" else [] if value is None else value if isinstance(value, list) else [value]
        if not all(name in known for name in names) or (key == "samplers" and value == []):
            raise UserError(f"{key}={value} must be among {', '.join(known)}, or all")
        return names


SETTINGS = {"train": Train, "distill": Distill, "evaluate": Evaluate, "sample": Sample, "estimate": Estimate}


def register() -> None:
    """Makes the settings known to Hydra, as the schemas `<command>_settings` that conf/<command>.yaml begins with."""
    for command, settings in SETTINGS.items():
        ConfigStore.instance().store(f"{command}_settings", settings)


def conf() -> Path:
    """The configuration: in a wheel inside the package, in a checkout beside src/."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parents[1] / "conf"


def settings_of(cfg: DictConfig) -> Any:
    """The composed configuration as its dataclass, checked. Raises UserError where a key or a value cannot be."""
    settings = OmegaConf.to_object(cfg)
    known = {f.name for f in fields(type(settings))}  # type: ignore[arg-type]
    if unknown := [str(key) for key in cfg if key not in known]:
        raise UserError(f"there is no key {unknown[0]} (--help lists them)")
    return settings


register()
