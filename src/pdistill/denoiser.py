"""The thing that flows: a network together with what its output means."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from pdistill import network as networks
from pdistill import registry
from pdistill.parameterization import Parameterization, broadcast
from pdistill.sampling import DDIM, Condition
from pdistill.schedule import Schedule


class Codec(Protocol):
    """What stands between a denoiser of latents, conditioned on text, and pixels and words.

    It is no part of the denoiser's modules: not trained, averaged, nor kept in checkpoints.
    """

    prompts: list[str]
    """That the denoiser was distilled with; samples take them in turn where no others are given."""

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> images (B, C, H, W), about [-1, 1]."""
        ...

    def condition(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What the network is given of B prompts: tensors (B, ...)."""
        ...


class Denoiser(nn.Module):
    """`denoiser(z, t, condition=None) -> x_hat`: images (B, C, H, W) at times t (B,) to denoised images.

    `condition` is None, labels (B,), or a dict of tensors whose first dimension is B. `num_steps` is the step count it
    was distilled for (None for a teacher); `lineage` lists the step counts of its ancestors, e.g. ["teacher", 16, 8].
    `null_label` is the label that stands for none, where the network was trained with label dropout: its last.
    `image_shape` (C, H, W) must be given for a network that is not a UNet2DModel. `guidance` is the range (low, high)
    of classifier-free guidance that it was taught, at one evaluation a step; None for a denoiser that was not.
    `sampler` is the one that a student was distilled for, by its name; `sample` takes it by default.
    `codec` belongs to a denoiser of latents, whose condition is text. `adapters` are those that are merged into the
    weights: see `pdistill.lora`.
    """

    def __init__(
        self,
        network: nn.Module,
        parameterization: Parameterization,
        schedule: Schedule,
        num_steps: int | None = None,
        lineage: list[str | int] | None = None,
        null_label: int | None = None,
        *,
        image_shape: tuple[int, int, int] | None = None,
        guidance: tuple[float, float] | None = None,
        sampler: str = DDIM,
        codec: Codec | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.parameterization = parameterization
        self.schedule = schedule
        self.num_steps = num_steps
        self.lineage = lineage or ["teacher"]
        self.null_label = null_label
        self.guidance = guidance
        self.codec = codec
        self.adapters: dict[str, Tensor] | None = None
        self._image_shape = image_shape
        self.sampler = sampler
        self.on_pass: Callable[[nn.Module, int], None] | None = None  # is told of each evaluation: network, images

    def forward(self, z: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        alpha, sigma = (broadcast(a, z) for a in self.schedule.alpha_sigma(self.schedule(t)))
        return self.parameterization.to_x(self.output(z, t, condition), z, alpha, sigma)

    def output(self, z: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """What the network says (B, C', H, W), before the parameterization reads it."""
        scaled, scale = z, getattr(self.parameterization, "scale_input", None)
        if scale is not None:
            scaled = scale(z, *(broadcast(a, z) for a in self.schedule.alpha_sigma(self.schedule(t))))
        if self.on_pass is not None:
            self.on_pass(self.network, len(z))
        return networks.call(self.network, scaled, self.schedule.timestep(t), condition).to(z.dtype)

    @property
    def step_counts(self) -> list[int]:
        """Those that it was trained for: of a teacher none, of a student its own, of one with heads several."""
        own = [] if self.num_steps is None else [self.num_steps]
        return list(getattr(self.parameterization, "counts", ())) or own

    def for_steps(self, num_steps: int) -> "Denoiser":
        """What is sampled in that many steps: itself, or, of one that knows several counts, that student.

        Raises ValueError where it does not know this one.
        """
        if not getattr(self.parameterization, "counts", ()):
            return self
        from pdistill import heads

        return heads.fused(self, num_steps)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what it denoises: images, or latents."""
        return self._image_shape or networks.image_shape_of(self.network)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that are made of that."""
        return self.image_shape if self.codec is None else self.codec.pixel_shape

    @property
    def clips(self) -> bool:
        """Whether x_hat may be clamped to [-1, 1], as pixels are; latents have no such range."""
        return self.codec is None

    @property
    def has_null_condition(self) -> bool:
        """Whether something stands for no condition: a null label, or the empty prompt."""
        return self.null_label is not None or self.codec is not None

    @property
    def num_classes(self) -> int | None:
        """How many classes it knows; None if it is unconditional."""
        return networks.num_class_embeds(self.network) if self.null_label is None else self.null_label

    def null_condition(self, condition: Condition) -> Condition:
        """The condition that stands for none, of the same shape: the null label, or the empty prompt.

        Raises ValueError where there is none.
        """
        if self.codec is not None and isinstance(condition, dict):
            null = self.codec.condition([""], next(iter(condition.values())).device)
            return condition | {k: v.to(condition[k].dtype).expand_as(condition[k]) for k, v in null.items()}
        label = condition.get("label") if isinstance(condition, dict) else condition
        if self.null_label is None or label is None:
            raise ValueError("this denoiser has no null label: it was trained without label_dropout")
        nulls = torch.full_like(label, self.null_label)
        return condition | {"label": nulls} if isinstance(condition, dict) else nulls

    @property
    def default_guidance(self) -> float:
        """1, plain; of a denoiser that was taught guidance what lies nearest to it."""
        low, high = self.guidance or (1.0, 1.0)
        return min(max(1.0, low), high)

    @property
    def takes_guidance(self) -> bool:
        """Whether the network has it as an input: it was taught more than one value."""
        return self.guidance is not None and self.guidance[0] < self.guidance[1]

    def told(self, condition: Condition, guidance: Tensor) -> Condition:
        """The condition with the guidance (B,) among it, where the network takes it."""
        if not self.takes_guidance or condition is None:
            return condition
        given = condition if isinstance(condition, dict) else {"label": condition}
        return given | {"guidance": guidance}

    @property
    def architecture(self) -> dict[str, Any]:
        """What must be equal for two denoisers' weights and outputs to mean the same."""
        network = networks.description(self.network)
        arguments = {k: v for k, v in network["arguments"].items() if k != "dropout"}
        return {
            "parameterization": _named("parameterization", self.parameterization),
            "schedule": _named("schedule", self.schedule),
            "null_label": self.null_label,
            "image_shape": list(self.image_shape),
            "network": {"name": network["name"], **arguments},
        } | self.taught

    @property
    def taught(self) -> dict[str, Any]:
        """What is written down of those that have it alone, so that the others' descriptions stay what they were."""
        guidance: dict[str, Any] = {} if self.guidance is None else {"guidance": list(self.guidance)}
        return guidance | ({} if self.sampler == DDIM else {"sampler": self.sampler})

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the weights and what they mean, wherever the denoiser lies."""
        return networks.digest_of_weights(self.network, json.dumps(self.architecture, sort_keys=True))

    def check_storable(self) -> None:
        """Raises UserError where `save` would: for a part that is not registered."""
        from pdistill import storage

        storage.describe(self)

    def save(self, directory: str | Path, grid: int | None = None) -> None:
        """Writes the directory, whole or not at all: see `storage.save`."""
        from pdistill import storage

        storage.save(self, Path(directory), grid)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """The continuous-time denoiser of a directory, on the CPU, in eval mode: see `storage.load`."""
        from pdistill import storage

        return storage.load(Path(directory), cls)


def _named(group: str, part: Any) -> dict[str, Any]:
    """A parameterization or schedule as its registered name and its state."""
    name = registry.name_of(group, type(part)) or getattr(part, "name", None) or type(part).__name__
    return {"name": name, **registry.state_of(part)}
