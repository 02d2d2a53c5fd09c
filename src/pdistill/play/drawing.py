"""What a page asks for, and the pictures that a denoiser makes of it."""

import base64
import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdistill import __version__
from pdistill.checks import number, whole
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.faults import in_words
from pdistill.generation import Draw, drawn
from pdistill.play.lineup import Player
from pdistill.randomness import sample_noise
from pdistill.report.grids import png
from pdistill.sampling import sampler_of

PICTURES, STEPS, BETWEEN = "pictures", "every step", "between two noises"
VIEWS = (PICTURES, STEPS, BETWEEN)
MOST_IMAGES = 16
MOST_STEPS = 4096
MOST_FRAMES = 24  # of the trajectory; of more steps some are shown, evenly spread
LARGEST_SEED = 2**31
WIDTH = 256  # of a picture that is saved, at most, where it is enlarged


@dataclass(frozen=True)
class Wish:
    """What the controls of the page say. None: each denoiser's own."""

    view: str = PICTURES
    num_images: int = 8
    seed: int = 0
    num_steps: int | None = None
    sampler: str | None = None
    label: int | None = None
    """By default all classes take turns."""
    guidance: float | None = None
    prompt: str | None = None
    picture: int = 1
    """Which of the pictures is followed, from 1."""
    second_seed: int = 1
    """Of the noise that the last picture in between is made of."""

    def __post_init__(self) -> None:
        if self.view not in VIEWS:
            raise UserError(f"show must be one of {', '.join(VIEWS)}, not {self.view}")
        _count("number of pictures", self.num_images, 1, MOST_IMAGES)
        _count("picture", self.picture, 1, MOST_IMAGES)
        _count("seed", self.seed, 0, LARGEST_SEED)
        _count("second seed", self.second_seed, 0, LARGEST_SEED)
        if self.num_steps is not None:
            _count("steps", self.num_steps, 1, MOST_STEPS)
        if self.guidance is not None:
            number("guidance", self.guidance, 1000)
        if self.label is not None:
            whole("label", self.label, 0)

    @property
    def indices(self) -> list[int]:
        """Which images of the seed are drawn: image i is that of `pdistill sample` with this seed."""
        if self.view == STEPS:
            return [self.picture - 1]
        return [0] * self.num_images if self.view == BETWEEN else list(range(self.num_images))

    def draw(self, num_steps: int) -> Draw:
        """For `generation.drawn`, of a denoiser that is sampled in `num_steps` unless the wish says otherwise."""
        labels = None if self.label is None else [self.label]
        prompts = [self.prompt] if self.prompt else None
        options: dict[str, Any] = {"sampler": self.sampler, "guidance": self.guidance}
        return Draw(self.num_steps or num_steps, self.seed, labels=labels, prompts=prompts, **options)


def _count(what: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        given = "nothing" if value is None else value
        raise UserError(f"{what} must be a whole number from {least:,} to {most:,}, not {given}")


@dataclass(frozen=True)
class Strip:
    """What one denoiser made of a wish: images (B, C, H, W) on the CPU, a caption for each, and what it took."""

    images: Tensor
    captions: list[str]
    seconds: float
    settings: list[dict[str, Any]]
    """Of each image, what makes it again."""
    note: str = ""

    def file(self, k: int) -> bytes:
        """Image k as a PNG with its settings inside."""
        settings = self.settings[k]
        texts = {"Software": f"pdistill {__version__}", "pdistill": json.dumps(settings)}
        return png(self.images[k], texts | {"Comment": settings["command"]} if settings["command"] else texts, WIDTH)

    def address(self, k: int) -> str:
        """The same as a data address, for a page that needs no other file."""
        return f"data:image/png;base64,{base64.b64encode(self.file(k)).decode()}"


def draw(
    denoiser: Denoiser, player: Player, wish: Wish, on_pass: Callable[[], None], on_step: Callable[[int, int], None]
) -> Strip:
    """The pictures of one line. `on_pass()` is called before each evaluation, and ends the work if it raises;
    `on_step(k, n)` after step k of n.

    Raises UserError for what this denoiser does not take, and for samples that are not finite.
    """
    _check_label(denoiser, player, wish.label)
    plan = wish.draw(player.num_steps)
    kept, frames = set(_shown(plan.num_steps)), []
    device = next(denoiser.parameters()).device

    def see(i: int, z: Tensor, x_hat: Tensor) -> None:
        if wish.view == STEPS and i in kept:
            frames.append((i, x_hat.clone()))
        on_step(plan.num_steps - i + 1, plan.num_steps)

    denoiser.on_pass = lambda network, images: on_pass()
    try:
        with in_words(player.name, "draw fewer pictures"):
            start = time.perf_counter()
            images = drawn(denoiser, wish.indices, plan, device, see, _noise_between(denoiser, wish)).cpu()
            seconds = time.perf_counter() - start
    except ValueError as error:  # a sampler, guidance or step count that this one does not take
        raise UserError(str(error)) from error
    finally:
        denoiser.on_pass = None
    captions = [""] * len(images)
    note = ""
    if wish.view == STEPS:
        times = [f"t = {i / plan.num_steps:.3g}" for i, _ in frames]
        note = "" if len(kept) == plan.num_steps else f"{len(frames)} of its {plan.num_steps} steps are shown"
        if not frames:  # of a sampler of somebody's own
            note, times = "this sampler does not show its steps: the last picture alone", ["t = 0"]
        else:
            with torch.inference_mode():
                codec, x_hats = denoiser.codec, torch.cat([x_hat for _, x_hat in frames])
                images = (x_hats if codec is None else codec.decode(x_hats)).cpu()
        captions = times
    elif wish.view == PICTURES and denoiser.num_classes is not None and wish.label is None:
        captions = [f"class {k % denoiser.num_classes}" for k in wish.indices]
    settings = [_settings(denoiser, player, wish, plan, k, caption) for k, caption in enumerate(captions)]
    return Strip(images, captions, seconds, settings, note)


def _check_label(denoiser: Denoiser, player: Player, label: int | None) -> None:
    if label is None:
        return
    if denoiser.num_classes is None:
        raise UserError(f"label={label}: {player.directory} is not class-conditional: leave it out")
    if label >= denoiser.num_classes:
        raise UserError(f"label={label} must be of the classes 0 to {denoiser.num_classes - 1}")


def _shown(num_steps: int) -> list[int]:
    """The steps i = N, ..., 1 of a trajectory that are shown, first and last included."""
    if num_steps <= MOST_FRAMES:
        return list(range(num_steps, 0, -1))
    return [num_steps - round(k * (num_steps - 1) / (MOST_FRAMES - 1)) for k in range(MOST_FRAMES)]


def _noise_between(denoiser: Denoiser, wish: Wish) -> Tensor | None:
    if wish.view != BETWEEN:
        return None
    first, last = (sample_noise(seed, [0], denoiser.image_shape)[0] for seed in (wish.seed, wish.second_seed))
    return between(first, last, wish.num_images)


def between(first: Tensor, last: Tensor, count: int) -> Tensor:
    """(count, *shape) from one noise to another on the arc between them; the mean length stays that of noise.

    sin((1 - f) w) / sin(w) first + sin(f w) / sin(w) last at f = 0, ..., 1, with w the angle between them.
    """
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-1, 1)
    angle = float(torch.arccos(cosine.double()))
    if math.sin(angle) < 1e-6:  # the same noise
        return first.expand(count, *first.shape).clone()
    f = torch.linspace(0, 1, count, dtype=torch.float64).reshape(-1, *[1] * first.ndim)
    weights = torch.sin((1 - f) * angle) / math.sin(angle), torch.sin(f * angle) / math.sin(angle)
    return weights[0].to(first.dtype) * first + weights[1].to(first.dtype) * last


def _settings(denoiser: Denoiser, player: Player, wish: Wish, plan: Draw, k: int, caption: str) -> dict[str, Any]:
    """What makes image k again: the command, where one does, and every setting."""
    index = wish.indices[min(k, len(wish.indices) - 1)]
    label = wish.label if wish.label is not None or denoiser.num_classes is None else index % denoiser.num_classes
    guided = denoiser.guidance is not None or denoiser.has_null_condition
    guidance = denoiser.default_guidance if wish.guidance is None else wish.guidance
    settings: dict[str, Any] = {
        "denoiser": str(player.directory),
        "view": wish.view,
        "num_steps": plan.num_steps,
        "sampler": sampler_of(denoiser, plan.sampler),
        "seed": wish.seed,
        "picture": index + 1,
        "label": label,
        "guidance": guidance if guided else None,
        "prompt": wish.prompt,
        "command": None,
        "version": __version__,
    }
    if wish.view == BETWEEN:
        settings |= {"second_seed": wish.second_seed, "fraction": round(k / max(1, wish.num_images - 1), 6)}
    elif wish.view == STEPS:
        settings |= {"time": caption.removeprefix("t = ")}
    else:
        settings["command"] = _command(settings, wish)
    return settings


def _command(settings: dict[str, Any], wish: Wish) -> str:
    """The `pdistill sample` that draws the same pictures."""
    words = {"denoiser": settings["denoiser"], "num_steps": settings["num_steps"], "seed": wish.seed}
    words |= {"num_images": wish.num_images, "sampler": wish.sampler, "guidance": wish.guidance, "label": wish.label}
    words |= {"prompt": json.dumps(wish.prompt) if wish.prompt else None}
    return "pdistill sample " + " ".join(shlex.quote(f"{k}={v}") for k, v in words.items() if v is not None)
