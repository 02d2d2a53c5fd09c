"""Other people's diffusers models as Denoisers: any UNet2DModel with a scheduler of discrete betas or of flow matching.

Read by the classes of the components, not of the pipeline: `unet/` and `scheduler/`, or the flat layout of the oldest
models. What cannot be read is refused by name, of a model on the hub before its weights are fetched. Nothing is
unpickled but by torch's weights_only loading, and no remote code runs. docs/teachers.md has the table of what is read.
"""

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from pdistill import claims, processes
from pdistill.checks import is_count
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError, first_line
from pdistill.interop import stable_diffusion
from pdistill.interop.hub import LAYOUT, WEIGHTS, fetch_components, fetch_weights, fetched
from pdistill.parameterization import Eps, Flow, Parameterization, V, X
from pdistill.reading import json_of, text_of
from pdistill.schedule import BetaSchedule, DiscreteBetaSchedule, FlowSchedule, Schedule
from pdistill.unets import UNet2DModel

PREDICTIONS = {"epsilon": Eps, "sample": X, "v_prediction": V}
SUPPORTED = (
    "a UNet2DModel of pixels (unconditional or with class labels) with a scheduler of betas (DDPM, DDIM, PNDM, "
    "DPM-Solver, UniPC, DEIS, Euler, Heun, ...) or FlowMatchEulerDiscreteScheduler, and text to image of the shapes of "
    "Stable Diffusion 1.x and 2.x"
)
PICKLES = (".pkl", ".pickle", ".ckpt", ".pt", ".pth")
# Components of model_index.json that tell what kind of model it is, and what that kind is called.
FOREIGN = {
    "vae": "it works on latents (vae), not on pixels, and has no text_encoder",
    "vqvae": "it works on latents (vqvae), not on pixels",
    "movq": "it works on latents (movq), not on pixels",
    "transformer": "its network is a transformer",
    "prior": "its network is a prior, not one of images",
}
EARLY_NETWORKS = ("UNetModel", "UNetUnconditionalModel", "DDPM")
TIME_EMBEDDINGS = {
    "fourier": " (variance exploding), whose output is divided by the time",
    "learned": ", which has no times between its own: give the model that it was made from",
}


def is_denoiser(path: str | Path) -> bool:
    """Whether it is a directory that `Denoiser.save` wrote, rather than a diffusers folder or a model on the hub."""
    return (Path(path).expanduser() / "denoiser.json").is_file()


def load_diffusers_teacher(path: str | Path, revision: str | None = None, null_label: int | None = None) -> Denoiser:
    """The continuous-time denoiser of a diffusers folder, or of a model on the hub, in eval mode, float32.

    It keeps its own noise schedule and the timesteps that it was trained with. `revision` is a branch, tag or commit of
    a model on the hub. `null_label` is the class that stands for none, where it was trained so: the last one. Learned
    variances are dropped. A Stable Diffusion folder becomes a denoiser of latents, at the times that it was trained at
    alone, whose conditions its `codec` makes of prompts. Its lineage begins with
    "diffusers:" and the hub id or the folder's name. Raises UserError for what is missing, damaged or not supported.
    """
    try:
        return _loaded(str(path), revision, null_label)
    except (UserError, OSError):
        raise
    except Exception as error:  # of values that are of another kind than diffusers writes
        raise UserError(f"{path} is damaged ({_in_one_line(error)}): copy the folder again") from error


def _loaded(name: str, revision: str | None, null_label: int | None) -> Denoiser:
    on_hub = not _is_folder(name)
    if not on_hub and revision is not None:
        raise UserError(f"{name} is a folder, and revision={revision} is for models on the hub: leave it out")
    folder = fetched(name, revision) if on_hub else Path(name).expanduser()
    index = _index(folder, name)
    unet, scheduler = (
        _component(folder, name, "unet", "config.json"),
        _component(folder, name, "scheduler", "scheduler_config.json"),
    )
    config, kept = _read(unet / "config.json"), _read(scheduler / "scheduler_config.json")
    reads_text = stable_diffusion.is_text_to_image(index, config)
    if reads_text:
        _refuse_text_to_image(folder, name, config, null_label)
    else:
        _refuse_network(name, config, null_label)
    schedule, parameterization = _schedule(name, scheduler, kept)
    if on_hub:
        fetch_weights(name, revision, unet.relative_to(folder))
    lineage: list[str | int] = [f"diffusers:{name if on_hub else folder.resolve().name}"]
    if reads_text:
        if not isinstance(schedule, BetaSchedule):
            raise _refusal(name, "its scheduler is of flow matching, and it is read with a scheduler of betas alone")
        if on_hub:
            fetch_components(name, revision, stable_diffusion.LINKED)
        network, discrete = (
            _network(name, unet, diffusers.UNet2DConditionModel),
            DiscreteBetaSchedule(schedule.alphas_cumprod),
        )
        codec = stable_diffusion.Codec(folder)
        return Denoiser(network, parameterization, discrete, lineage=lineage, codec=codec).eval()
    network = _network(name, unet, UNet2DModel)
    _drop_learned_variance(name, network, kept)
    return Denoiser(network, parameterization, schedule, lineage=lineage, null_label=null_label).eval()


def _is_folder(name: str) -> bool:
    """False for what can only be a model on the hub, owner/name. Raises UserError for a path to no folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        return True
    if name.endswith(PICKLES):
        raise UserError(
            f"{name} is a pickled file, which can run code when it is loaded, and is never opened: convert it to a "
            f"diffusers folder first (UNet2DModel.save_pretrained). Supported: {SUPPORTED}"
        )
    if path.exists():
        raise UserError(f"{name} is a file: give the diffusers folder, which holds {LAYOUT}")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or Path(name).parent.is_dir():
        raise UserError(
            f"there is no folder {name}: give a diffusers folder, which holds {LAYOUT}, or a model on the hub as "
            f"owner/name"
        )
    return False


def _component(folder: Path, name: str, component: str, config: str) -> Path:
    """Its own folder, or the root of the flat layout."""
    for place in (folder / component, folder):
        if (place / config).exists():
            return place
    pickled = [file.name for file in sorted(folder.rglob("*")) if file.suffix in PICKLES]
    why = f" ({pickled[0]} is pickled, and never opened: convert it first)" if pickled else ""
    raise UserError(
        f"{name} holds no {component}/{config} and no {config}{why}: expected a diffusers folder, which holds "
        f"{LAYOUT}. Supported: {SUPPORTED}"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json_of(text_of(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): copy the folder again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: expected a JSON object; copy the folder again")
    return content


def _in_one_line(error: Exception) -> str:
    """Of other people's errors, whose first line often says nothing."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _refusal(name: str, reason: str) -> UserError:
    return UserError(f"{name} cannot be a teacher: {reason}. Supported: {SUPPORTED}")


def _remote_code(config: dict[str, Any]) -> str | None:
    """The file of code that it names, if it does."""
    class_name = config.get("_class_name")
    named = config.get("_module") or config.get("auto_map") or (class_name if isinstance(class_name, list) else None)
    return (
        None
        if named is None
        else f"it needs remote code ({named}), which never runs: save its network and scheduler by save_pretrained"
    )


def _index(folder: Path, name: str) -> dict[str, Any]:
    """What model_index.json names, empty where there is none. Raises UserError for what it tells is not supported."""
    if is_denoiser(folder):
        raise UserError(f"{name} is a denoiser of pdistill, not a diffusers folder: give it as it is, teacher={name}")
    index = _read(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    present = {k: v for k, v in index.items() if v != [None, None] and v is not None}
    foreign = stable_diffusion.FOREIGN if "text_encoder" in present else FOREIGN
    if reason := (_remote_code(index) or next((why for part, why in foreign.items() if part in present), None)):
        raise _refusal(name, reason)
    return present


def _refuse_text_to_image(folder: Path, name: str, config: dict[str, Any], null_label: int | None) -> None:
    """What the files of a model with text tell."""
    if reason := (_remote_code(config) or stable_diffusion.refusal(folder, config)):
        raise _refusal(name, reason)
    stable_diffusion.check_packages()
    if null_label is not None:
        raise UserError(
            f"null_label={null_label}, and {name} knows no classes, but text: its empty prompt stands for none; leave "
            f"it out"
        )
    _check_size(name, config)


def _refuse_network(name: str, config: dict[str, Any], null_label: int | None) -> None:
    """What the network's config.json tells."""
    kind, time = config.get("_class_name"), config.get("time_embedding_type", "positional")
    if reason := _remote_code(config):
        raise _refusal(name, reason)
    if kind != "UNet2DModel":
        early = ", of an early diffusers, which today's cannot load" if kind in EARLY_NETWORKS else ""
        raise _refusal(name, f"its network is a {kind}{early}")
    if time != "positional":
        raise _refusal(name, f"its time embedding is {time!r}{TIME_EMBEDDINGS.get(str(time), '')}")
    if config.get("class_embed_type") is not None:
        raise _refusal(name, f"its class_embed_type is {config['class_embed_type']!r}, whose labels are not classes")
    _check_size(name, config)
    classes = config.get("num_class_embeds")
    if null_label is None:
        return
    if classes is None:
        raise UserError(f"null_label={null_label}, and {name} has no classes: leave it out")
    if null_label != classes - 1:
        raise UserError(
            f"null_label={null_label}, and {name} has the labels 0 to {classes - 1}: the one that stands for none is "
            f"the last, {classes - 1}; leave null_label out where there is none"
        )


def _check_size(name: str, config: dict[str, Any]) -> None:
    size: Any = config.get("sample_size")
    if _is_size(size):
        claims.check_shape((1, *(size if isinstance(size, list) else (size, size))))
    else:
        raise UserError(
            f"{name} does not tell the size of its images (sample_size is {config.get('sample_size')!r}): write "
            f'"sample_size": 32, or [height, width], into its config.json'
        )


def _is_size(size: Any) -> bool:
    """A positive integer, or a pair of them."""
    pair = size if isinstance(size, list) else [size, size]
    return len(pair) == 2 and all(type(side) is int and side > 0 for side in pair)


def _network(name: str, unet: Path, kind: Any) -> Any:
    """By `from_pretrained`, which alone renames old attention keys; fp16 files are read where there are no others."""
    files = [file.name for file in unet.iterdir() if file.name.startswith(WEIGHTS)]
    if not files:
        raise UserError(f"{name} holds no {WEIGHTS}.safetensors or .bin beside its config.json: copy the folder again")
    plain = any(".fp16" not in file for file in files)
    diffusers.utils.logging.disable_progress_bar()
    config = _read(unet / "config.json")
    try:
        claims.check_layers(config)
        claims.check_bytes(lambda: kind.from_config(config), [unet / file for file in files])
        network, told = kind.from_pretrained(
            str(unet),
            variant=None if plain else "fp16",
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers', safetensors' and torch's own
        pickled = not any(file.endswith(".safetensors") for file in files)
        more = ", or it holds more than weights, which never run" if pickled else ""
        raise UserError(
            f"diffusers cannot load the network of {name} ({_in_one_line(error)}): its files are "
            f"damaged or do not fit its config.json{more}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[problem]:
            raise UserError(
                f"the weights of {name} do not fit its config.json ({problem.replace('_', ' ')}: "
                f"{sorted(map(str, told[problem]))[0]}, {len(told[problem])} in all): copy the folder again"
            )
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise UserError(f"{name} holds weights that are not finite (NaN or infinite): fetch or train it again")
    return network


def _schedule(name: str, scheduler: Path, config: dict[str, Any]) -> tuple[Schedule, Parameterization]:
    kind = str(config.get("_class_name"))
    if reason := _remote_code(config):
        raise _refusal(name, reason)
    cls = getattr(diffusers, kind, None)
    if not isinstance(cls, type) or not (issubclass(cls, diffusers.SchedulerMixin) or hasattr(cls, "_backends")):
        raise _refusal(
            name, f"diffusers {diffusers.__version__} has no scheduler {kind}: save its betas as DDPMScheduler's"
        )
    if not is_count(config.get("num_train_timesteps", 1000)):
        raise _refusal(name, f"its num_train_timesteps is {config['num_train_timesteps']!r:.50}")
    try:
        loaded: Any = cls.from_pretrained(str(scheduler))  # type: ignore[attr-defined]
    except Exception as error:
        raise UserError(
            f"diffusers cannot load the scheduler of {name} ({kind}: {_in_one_line(error)}): correct its "
            f"scheduler_config.json"
        ) from error
    kept = loaded.config
    if kind == "FlowMatchEulerDiscreteScheduler":
        for key in ("use_dynamic_shifting", "invert_sigmas"):
            if kept.get(key):
                raise _refusal(name, f"its scheduler has {key}, where a fixed shift is needed")
        return FlowSchedule(shift=float(kept["shift"]), train_timesteps=int(kept["num_train_timesteps"])), Flow()
    prediction = kept.get("prediction_type", "epsilon")
    if "FlowMatch" in kind or prediction == "flow_prediction" or kept.get("use_flow_sigmas"):
        raise _refusal(name, f"its flow matching comes with {kind}: write it as FlowMatchEulerDiscreteScheduler")
    if not hasattr(loaded, "alphas_cumprod"):
        raise _refusal(name, f"its scheduler {kind} has no betas")
    if prediction not in PREDICTIONS:
        raise _refusal(name, f"its prediction_type is {prediction!r}, not one of {', '.join(PREDICTIONS)}")
    if kept.get("thresholding"):
        raise _refusal(
            name, 'its scheduler thresholds dynamically, which distillation cannot: write "thresholding": false'
        )
    if kept.get("timestep_type") == "continuous":
        raise _refusal(name, "its network sees the logarithm of sigma (timestep_type), not timesteps")
    schedule = _betas(name, loaded)
    if prediction == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise UserError(
            f"{name} predicts epsilon and ends at exactly zero SNR, where x_hat = (z - sigma eps) / alpha divides by "
            f"zero: give a v_prediction or sample model, or a scheduler without rescale_betas_zero_snr"
        )
    return schedule, PREDICTIONS[prediction]()


def _betas(name: str, scheduler: Any) -> BetaSchedule:
    values, steps = scheduler.alphas_cumprod.double().tolist(), scheduler.config["num_train_timesteps"]
    if len(values) != steps:
        raise UserError(
            f"the scheduler of {name} has {len(values)} trained_betas for num_train_timesteps {steps}: write "
            f"{len(values)} for those"
        )
    if scheduler.config.get("rescale_betas_zero_snr"):
        values[-1] = 0.0  # some schedulers keep 2^-24, so that their first sigma is finite
    try:
        return BetaSchedule(tuple(values))
    except ValueError as error:
        raise UserError(
            f"the betas of {name} cannot be a schedule ({first_line(error)}): correct its scheduler_config.json"
        ) from error


def _drop_learned_variance(name: str, network: UNet2DModel, scheduler: dict[str, Any]) -> None:
    """The first half of the output channels is the prediction; the second, the variance, matters to no DDIM."""
    channels, out = network.config["in_channels"], network.config["out_channels"]
    if out == channels:
        return
    if out != 2 * channels:
        raise _refusal(name, f"its network takes {channels} channels and gives {out}, neither an image nor two")
    if scheduler.get("variance_type") not in ("learned", "learned_range"):
        raise UserError(
            f"{name} gives {out} channels for {channels}, and its scheduler does not say that the second half is a "
            f'variance: write "variance_type": "learned_range" into scheduler_config.json, if it is'
        )
    with torch.no_grad():
        conv = nn.Conv2d(network.conv_out.in_channels, channels, 3, padding=1)
        conv.weight.copy_(network.conv_out.weight[:channels])
        conv.bias.copy_(network.conv_out.bias[:channels])  # type: ignore[union-attr,arg-type]
    network.conv_out = conv
    network.register_to_config(out_channels=channels)
    if processes.is_main():
        print(f"{name}: the learned variance ({out - channels} of {out} output channels) is dropped, DDIM needs none")
