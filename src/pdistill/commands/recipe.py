"""What a configuration takes from a diffusers model at `teacher=`, by its JSON alone: torch is not imported here."""

import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pdistill.commands.identity import is_imported
from pdistill.commands.names import typed_overrides
from pdistill.errors import UserError
from pdistill.files import read_json

LARGEST, MOST_LEVELS = 2**16, 16  # of images, and of halvings of an autoencoder: more is refused with the teacher
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
OF_THE_TEACHER = "of the teacher"  # what the groups that a diffusers model replaces say in config.yaml and run.json
PARAMETERIZATIONS = {"sample": "X", "v_prediction": "V"}  # a student of another one predicts v


def read_recipe(cfg: DictConfig) -> None:
    """Sets in `cfg` what follows from a diffusers model: network, schedule, parameterization, and the images' size.

    From its JSON alone, so that a finished run is found in no time; what is missing or damaged there is told when the
    teacher is loaded. Raises UserError for groups that were asked for and cannot matter, and for a hub out of reach.
    """
    if not is_imported(cfg.teacher):
        return
    typed = _typed()
    for group in ("network", "schedule"):
        if any(key == group or key.startswith(f"{group}.") for key in typed):
            raise UserError(f"{group}={cfg_choice(group)}: a diffusers teacher keeps its own {group}; leave it out")
        OmegaConf.update(cfg, group, OF_THE_TEACHER, merge=False, force_add=True)
    unet, scheduler, vae = _configs(cfg.teacher, cfg.teacher_revision)
    if not _parameterization_asked(typed):
        kind = str(scheduler.get("prediction_type", "epsilon"))
        flow = scheduler.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
        name = "Flow" if flow else PARAMETERIZATIONS.get(kind, "V")
        OmegaConf.update(cfg, "parameterization", {"_target_": f"pdistill.parameterization.{name}"}, merge=False)
    size = unet.get("sample_size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    size = size if isinstance(size, int) and 0 < size <= LARGEST else None
    follows = {"image_size": size, "image_channels": unet.get("in_channels")}
    if vae and isinstance(size, int):  # of text to image: what the latents stand for
        blocks = vae.get("block_out_channels")
        levels = min(len(blocks), MOST_LEVELS) if isinstance(blocks, list) else 4
        follows = {"image_size": size * 2 ** (levels - 1)}
        follows["image_channels"] = vae.get("in_channels", 3)
    for key, value in follows.items():
        if isinstance(value, int) and key in (cfg.dataset or {}) and f"dataset.{key}" not in typed:
            OmegaConf.update(cfg, f"dataset.{key}", value)
    captions = vae and "prompt" in (cfg.dataset or {}) and cfg.dataset.prompt is None and cfg.dataset.path
    if captions and Path(str(cfg.dataset.path), "metadata.jsonl").expanduser().exists():
        cfg.dataset.prompt = "{text}"


def cfg_choice(group: str) -> str:
    """The name that was chosen in a group."""
    return str(HydraConfig.get().runtime.choices.get(group)) if HydraConfig.initialized() else group


def _typed() -> dict[str, str]:
    return typed_overrides(list(HydraConfig.get().overrides.task)) if HydraConfig.initialized() else {}


def _parameterization_asked(typed: dict[str, str]) -> bool:
    """On the command line or by an experiment; conf/run.yaml's own choice is x."""
    return "parameterization" in typed or cfg_choice("parameterization") not in ("parameterization", "x")


def _configs(teacher: str, revision: str | None) -> list[dict[str, Any]]:
    """The JSON of the network, of the scheduler and of the autoencoder; empty where there is none to read."""
    folder = Path(teacher).expanduser()
    if not folder.is_dir() and not folder.parent.is_dir() and re.fullmatch(HUB_ID, teacher):
        from pdistill.interop.hub import fetched

        folder = fetched(teacher, revision)
    found = []
    flat = {"unet": "config.json", "scheduler": "scheduler_config.json"}
    for component, file in (flat | {"vae": "config.json"}).items():
        places = (folder / component, folder) if component in flat else (folder / component,)
        try:
            content = next((c for p in places if (c := read_json(p / file)) is not None), {})
        except (UserError, OSError):
            content = {}
        found.append(content if isinstance(content, dict) else {})
    return found
