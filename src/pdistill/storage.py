"""A Denoiser on disk: a directory in which every part stands by its name.

`denoiser.json` names the parameterization, the schedule and the network. A UNet2DModel's directory is laid out as a
diffusers pipeline (`model_index.json`, `unet/`, and `scheduler/` or `pipeline.py`: see `interop.students`), a
UNet2DConditionModel's as a StableDiffusionPipeline (`interop.stable_diffusion`); any other network's weights are in
`network/`. Nothing is imported because a file says so: a name must be built in or registered.
"""

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import torch

from pdistill import claims, lora, registry
from pdistill import network as networks
from pdistill.checks import is_count
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError, first_line
from pdistill.files import read_json, whole_directory, write_json
from pdistill.interop import stable_diffusion, students
from pdistill.reading import tensors_of
from pdistill.sampling import DDIM
from pdistill.unets import UNet2DModel, is_conditional

FORMAT = 2  # 1, of version 0.1.0, is read too
DEFAULT_GRID = 1024  # steps that a teacher's diffusers pipeline is written for
WEIGHTS = Path("network", "model.safetensors")
IN_UNET = ("unet", networks.CONDITIONAL_UNET)  # networks of diffusers, which unet/ describes

D = TypeVar("D", bound=Denoiser)


def save(denoiser: Denoiser, directory: Path, grid: int | None = None) -> None:
    """Writes the directory whole or not at all, replacing one that stands there.

    `grid` is the step count that diffusers' pipeline is written for, by default `num_steps`. Of a teacher it is the
    first multiple of `grid`, by default of 1024, that is not below 1000, the steps of whoever gives no step count; it
    can be sampled in every number of steps that divides it. Raises UserError for a part that is not registered.
    """
    denoiser = lora.merged(denoiser)
    if denoiser.num_steps is None:
        grid = grid or DEFAULT_GRID
        grid *= -(-students.DEFAULT_STEPS // grid)
    if len(denoiser.step_counts) > 1:
        grid = math.lcm(*denoiser.step_counts)
    grid = grid or denoiser.num_steps or DEFAULT_GRID
    description = describe(denoiser) | {"pipeline_steps": grid, "fingerprint": denoiser.fingerprint}
    weights = {k: v.detach().cpu().contiguous() for k, v in denoiser.network.state_dict().items()}
    metadata = {
        "pdistill_num_steps": json.dumps(denoiser.num_steps),
        "pdistill_grid": json.dumps([i / grid for i in range(grid, 0, -1)]),
        "pdistill_lineage": json.dumps(denoiser.lineage),
    }
    with whole_directory(directory) as temporary:
        if isinstance(denoiser.network, UNet2DModel):
            students.write_unet(denoiser, weights, grid, metadata, temporary)
        elif is_conditional(denoiser.network):
            stable_diffusion.write(denoiser, weights, metadata, temporary)
        else:
            (temporary / WEIGHTS).parent.mkdir()
            students.save_weights(weights, temporary / WEIGHTS, metadata)
        if denoiser.adapters is not None:
            students.save_weights(lora.for_diffusers(denoiser.adapters), temporary / lora.FILE, {})
        write_json(temporary / "denoiser.json", description)


def describe(denoiser: Denoiser) -> dict[str, Any]:
    """What `denoiser.json` says of a denoiser's parts. Raises UserError for a part that a file cannot name."""
    made = networks.description(denoiser.network)
    description = {
        "format": FORMAT,
        "parameterization": _described("parameterization", denoiser.parameterization),
        "schedule": _described("schedule", denoiser.schedule),
        "network": {"name": made["name"]} if made["name"] in IN_UNET else made,
        "image_shape": list(denoiser.image_shape),
        "num_steps": denoiser.num_steps,
        "lineage": denoiser.lineage,
        "null_label": denoiser.null_label,
    } | denoiser.taught
    try:
        json.dumps(description)
    except TypeError as error:
        raise UserError(f"the arguments of a part do not fit into JSON ({error}): {description}") from error
    return description


def load(directory: Path, cls: type[D] = Denoiser) -> D:
    """The continuous-time denoiser of a directory that `save` wrote, on the CPU, in eval mode.

    Raises UserError for a directory that is missing, foreign or damaged, and for parts that are not known here.
    """
    if not directory.is_dir():
        raise UserError(f"no denoiser at {directory}: expected a directory that holds denoiser.json and unet/")
    try:
        description = read_json(directory / "denoiser.json", cure="copy or train the denoiser again")
        if description is None:
            raise FileNotFoundError(2, "missing", str(directory / "denoiser.json"))
        _check_values(description)
        if description["format"] not in (1, FORMAT):
            raise UserError(
                f"{directory} has format {description['format']}; this version reads formats 1 and {FORMAT}: "
                f"use the version of pdistill that wrote it, or a newer one"
            )
        made = description.get("network", {"name": "unet"})
        try:
            parameterization = _part("parameterization", description["parameterization"])
            schedule = _part("schedule", description["schedule"])
            registry.find("sampler", sampler := description.get("sampler", DDIM))
            if made["name"] not in IN_UNET:
                registry.find("network", made["name"])
        except UserError as error:
            raise UserError(f"{directory} cannot be loaded: {error}") from error
        if made["name"] == "unet":
            network = students.read_unet(directory)
        elif made["name"] == networks.CONDITIONAL_UNET:
            network = stable_diffusion.read(directory)
        else:
            network = networks.rebuild(made)
            network.load_state_dict(tensors_of(directory / WEIGHTS))
        shape, guidance = description.get("image_shape"), description.get("guidance")
        denoiser = cls(
            network,
            parameterization,
            schedule,
            description["num_steps"],
            description["lineage"],
            description.get("null_label"),
            image_shape=tuple(shape) if shape else None,
            guidance=None if guidance is None else (float(guidance[0]), float(guidance[1])),
            sampler=sampler,
            codec=stable_diffusion.Codec(directory) if made["name"] == networks.CONDITIONAL_UNET else None,
        )
        if (directory / lora.FILE).exists():
            denoiser.adapters = lora.from_diffusers(tensors_of(directory / lora.FILE))
        _check_parts(denoiser)
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is not a denoiser directory: {error.filename} is missing. "
            f"Expected what `Denoiser.save` writes, e.g. outputs/<name>/teacher/denoiser"
        ) from error
    except (UserError, OSError):
        raise
    except Exception as error:  # of values that no file of ours holds: diffusers', safetensors', torch's, a part's own
        raise UserError(
            f"{directory} is damaged or was written by another program ({type(error).__name__}: {first_line(error)}). "
            f"Copy or train it again"
        ) from error
    if not all(value.isfinite().all() for value in network.state_dict().values() if value.is_floating_point()):
        raise UserError(f"{directory} holds weights that are not finite (NaN or infinite): train it again")
    return denoiser.eval()


def _check_values(description: Any) -> None:
    """Raises ValueError where `denoiser.json` holds something else than `describe` writes."""
    lineage, guidance = description["lineage"], description.get("guidance")
    known = {
        "num_steps": description["num_steps"] is None or is_count(description["num_steps"]),
        "lineage": isinstance(lineage, list) and all(isinstance(word, str) or is_count(word) for word in lineage),
        "null_label": description.get("null_label") is None or type(description["null_label"]) is int,
        "guidance": guidance is None or (len(guidance) == 2 and 0 <= guidance[0] <= guidance[1] < math.inf),
    }
    if wrong := [key for key, fits in known.items() if not fits]:
        raise ValueError(f"its {wrong[0]} is {str(description.get(wrong[0]))[:50]}")


def _check_parts(denoiser: Denoiser) -> None:
    """Raises ValueError where the parts of a denoiser cannot be of one and the same."""
    shape, network = denoiser.image_shape, denoiser.network
    claims.check_shape(shape)
    claims.check_shape(denoiser.pixel_shape)
    if isinstance(network, UNet2DModel) and network.config["sample_size"] is not None:
        claims.check_shape(networks.image_shape_of(network))  # which diffusers would draw
    if isinstance(network, UNet2DModel) or is_conditional(network):
        channels = network.config["in_channels"], network.config["out_channels"]
        if channels != (shape[0], denoiser.parameterization.channels(shape[0])):
            raise ValueError(f"its network takes and gives {channels} channels, for images of {shape[0]}")
    labels = networks.num_class_embeds(network)
    if denoiser.null_label is not None and not 0 <= denoiser.null_label < (labels or math.inf):
        raise ValueError(f"its null_label is {denoiser.null_label}, of {labels} labels")
    if denoiser.schedule(torch.linspace(0, 1, 5, dtype=torch.float64)).isnan().any():
        raise ValueError("its schedule is not a number at some times")


def fingerprint_of(directory: Path) -> str:
    """The fingerprint of the denoiser in a directory, from its weights, whatever its description claims."""
    return load(directory).fingerprint


def _described(group: str, part: Any) -> dict[str, Any]:
    """A part's registered name and its state, with infinities in words. Raises UserError if it is not registered."""
    name, cls = registry.name_of(group, type(part)), type(part).__qualname__
    if name is None:
        raise UserError(
            f"the {group} {cls} is not registered, and a directory could not name it: call "
            f'pdistill.register("{group}", "<name>", {cls}), on the command line in a module of imports=[...]'
        )
    state = {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in registry.state_of(part).items()}
    return {"name": name, **state}


def _part(group: str, described: str | dict[str, Any]) -> Any:
    """The parameterization or schedule that a description names; format 1 has numbers as text, and names alone."""
    state = {"name": described} if isinstance(described, str) else dict(described)
    cls = registry.find(group, state.pop("name"))
    return cls(**{k: _number(v) for k, v in state.items()})


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
