"""`distill.py teacher=...`: what the configuration takes from a given teacher, and whether that goes with the rest.

A denoiser directory must be what the configuration says. A diffusers model brings its own network, noise schedule,
resolution and classes: the groups network and schedule do not matter, and the keys that follow from it are set.
"""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from pdistill.commands.run_directory import is_imported, typed_overrides
from pdistill.commands.settings import Distill, Train
from pdistill.dataset import ImageSet
from pdistill.errors import UserError
from pdistill.files import read_json

OF_THE_TEACHER = "of the teacher"  # what the groups that a diffusers model replaces say in config.yaml and run.json
PARAMETERIZATIONS = {"sample": "X", "v_prediction": "V"}  # a student of another one predicts v


def read_recipe(cfg: DictConfig) -> None:
    """Sets in `cfg` what follows from a diffusers model: network, schedule, parameterization, and the images' size.

    From its JSON alone, so that a finished run is found in no time; what is missing or damaged there is told when the
    teacher is loaded. Raises UserError for groups that were asked for and cannot matter.
    """
    if not is_imported(cfg.teacher):
        return
    typed = _typed()
    for group in ("network", "schedule"):
        if any(key == group or key.startswith(f"{group}.") for key in typed):
            raise UserError(f"{group}={cfg_choice(group)}: a diffusers teacher keeps its own {group}; leave it out")
        OmegaConf.update(cfg, group, OF_THE_TEACHER, merge=False, force_add=True)
    unet, scheduler = _configs(cfg.teacher, cfg.teacher_revision)
    if not _parameterization_asked(typed):
        kind = str(scheduler.get("prediction_type", "epsilon"))
        flow = scheduler.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
        name = "Flow" if flow else PARAMETERIZATIONS.get(kind, "V")
        OmegaConf.update(cfg, "parameterization", {"_target_": f"pdistill.parameterization.{name}"}, merge=False)
    size = unet.get("sample_size")
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    for key, value in {"image_size": size, "image_channels": unet.get("in_channels")}.items():
        if isinstance(value, int) and key in (cfg.dataset or {}) and f"dataset.{key}" not in typed:
            OmegaConf.update(cfg, f"dataset.{key}", value)


def given_teacher(settings: Distill) -> Any:
    """The denoiser that `teacher` names; None for none. Raises UserError for what cannot be read."""
    from pdistill.denoiser import Denoiser
    from pdistill.interop.teachers import load_diffusers_teacher

    if settings.teacher is None:
        return None
    if is_imported(settings.teacher):
        return load_diffusers_teacher(settings.teacher, settings.teacher_revision, settings.teacher_null_label)
    for key in ("teacher_revision", "teacher_null_label"):
        if getattr(settings, key) is not None:
            raise UserError(f"{key}={getattr(settings, key)} is for diffusers models, and {settings.teacher} is none")
    return Denoiser.load(Path(settings.teacher).expanduser())


def predicting(teacher: Any, parameterization: Any) -> Any:
    """A copy of the teacher whose output is read as another parameterization's; it is yet to be trained as such.

    Raises UserError where that has another number of channels.
    """
    import copy

    student = copy.deepcopy(teacher)
    channels = teacher.image_shape[0]
    if parameterization.channels(channels) != teacher.parameterization.channels(channels):
        raise UserError(
            f"parameterization={parameterization.name} has {parameterization.channels(channels)} channels, and the "
            f"teacher's network gives {teacher.parameterization.channels(channels)}: use parameterization=v or x"
        )
    student.parameterization = parameterization
    return student


def images_of(settings: Train, teacher: Any = None, device: Any = "cpu") -> ImageSet:
    """The configured dataset; with dataset=none samples of the teacher. Raises UserError for that without one."""
    data = instantiate(settings.dataset)
    if isinstance(data, ImageSet):
        return data
    if teacher is None:
        raise UserError("dataset=none has no images to train a teacher on: give distill.py teacher=..., or a dataset")
    return data(teacher, settings.steps.plan[0], device)


def check_data(settings: Distill, teacher: Any, data: ImageSet) -> None:
    """Raises UserError where a diffusers teacher and the data are of different sizes, channels or classes."""
    what = f"teacher={settings.teacher}"
    if teacher.image_shape != data.image_shape:
        words = ["x".join(map(str, shape)) for shape in (teacher.image_shape, data.image_shape)]
        raise UserError(
            f"{what} makes images of {words[0]} (channels, height, width) and dataset {data.name} holds {words[1]}: "
            f"leave dataset.image_size and dataset.image_channels out, or give another dataset"
        )
    if teacher.num_classes is None and settings.conditional:
        raise UserError(f"conditional=true, and {what} knows no classes: leave it out")
    if teacher.num_classes is not None and teacher.num_classes != data.num_classes:
        raise UserError(
            f"{what} knows {teacher.num_classes} classes and dataset {data.name} has {data.num_classes or 'no'} "
            f"labels' classes: give the classes that it was trained on, or dataset=none for its own samples"
        )


def cfg_choice(group: str) -> str:
    """The name that was chosen in a group."""
    return str(HydraConfig.get().runtime.choices.get(group)) if HydraConfig.initialized() else group


def _typed() -> dict[str, str]:
    return typed_overrides(list(HydraConfig.get().overrides.task)) if HydraConfig.initialized() else {}


def _parameterization_asked(typed: dict[str, str]) -> bool:
    """On the command line or by an experiment; conf/run.yaml's own choice is x."""
    return "parameterization" in typed or cfg_choice("parameterization") not in ("parameterization", "x")


def _configs(teacher: str, revision: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON of the network and of the scheduler; empty where it cannot be read."""
    folder = Path(teacher).expanduser()
    found = []
    for component, file in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        places = [folder / component / file, folder / file]
        if not folder.is_dir():
            places = [p for name in (f"{component}/{file}", file) if (p := _on_hub(teacher, name, revision))]
        try:
            content = next((c for p in places if (c := read_json(p)) is not None), {})
        except (UserError, OSError):
            content = {}
        found.append(content if isinstance(content, dict) else {})
    return found[0], found[1]


def _on_hub(model: str, file: str, revision: str | None) -> Path | None:
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, file, revision=revision))
    except Exception:  # told when the teacher is loaded
        return None
