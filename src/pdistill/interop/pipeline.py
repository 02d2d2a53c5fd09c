"""A diffusers pipeline that samples as `pdistill.sample` does what diffusers' own pipelines have no words for.

This file is copied into model folders, where `trust_remote_code=True` runs it: it needs torch and diffusers alone.

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)(batch_size=4, class_labels=[0, 1, 2, 3])
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

TO_X: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {  # of (output, z, alpha, sigma)
    "x": lambda x, z, a, s: x,
    "eps": lambda eps, z, a, s: (z - s * eps) / a,
    "v": lambda v, z, a, s: (a * z - s * v) / (a**2 + s**2),
    "flow": lambda u, z, a, s: (z - s * u) / (a + s),
    "x_eps": lambda o, z, a, s: (s**2 * o.chunk(2, 1)[0] + a * (z - s * o.chunk(2, 1)[1])) / (a**2 + s**2),
}


class StudentPipeline(DiffusionPipeline):
    """On a grid the sampler ddim, z_s = alpha_s x_hat + (sigma_s / sigma_t) (z_t - alpha_t x_hat), or stochastic.

    The latter (Meng et al., 2022, 2210.03142) takes such steps of double length, and after each goes half of it back by
    adding noise, z_m = (alpha_m / alpha_s) z_s + sqrt(sigma_m^2 - (alpha_m sigma_s / alpha_s)^2) eps.
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["scheduler"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        *,
        prediction: str = "flow",
        grid: dict[str, list[float]] | None = None,
        num_steps: int | None = None,
        noise_scale: float = 1.0,
        sigma_data: float = 0.5,
        num_classes: int | None = None,
        null_label: int | None = None,
        taught_guidance: list[float] | None = None,
        heads: dict[str, list[list[float]]] | None = None,
        sampler: str = "ddim",
    ) -> None:
        """`prediction` is x, eps, v, x_eps, flow or edm (with its `sigma_data`): what the network's output means.

        `grid` holds `timesteps`, `alphas` and `sigmas` at t = 1/G, ..., 1: what the network sees of time, and the
        process z_t = alpha x + sigma eps. By default they are the scheduler's: k, 1 - k/G, k/G. `num_steps` is the step
        count by default, G if it is None; z_1 is `noise_scale` x unit noise. `null_label` stands for no class.
        `taught_guidance` is the range that the network was taught, at one evaluation a step.
        `heads` are the step counts of a network that gives several images at once, each with the weights of those
        images in the prediction of each of its steps. `sampler` is ddim or stochastic.
        """
        super().__init__()
        if grid is None:
            if scheduler is None:
                raise ValueError("model_index.json has neither a grid nor a scheduler: save the student again")
            count = scheduler.config["num_train_timesteps"]
            ks = range(1, count + 1)
            grid = {
                "timesteps": [float(k) for k in ks],
                "alphas": [1 - k / count for k in ks],
                "sigmas": [k / count for k in ks],
            }
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            prediction=prediction,
            grid=grid,
            num_steps=num_steps or len(grid["sigmas"]),
            noise_scale=noise_scale,
            sigma_data=sigma_data,
            num_classes=num_classes,
            null_label=null_label,
            taught_guidance=taught_guidance,
            heads=heads,
            sampler=sampler,
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        clip: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """`batch_size` images (by default one, or one for each label) in `num_inference_steps` evaluations.

        `num_inference_steps` is by default the student's own, and must divide the grid. `class_labels` are by default
        all classes in turn. `guidance` other than 1, the default, is x_none + guidance (x_class - x_none): two
        evaluations a step, or one of a network that was taught it. `clip` clamps every prediction to [-1, 1]. All noise
        is drawn from `generator`. `output_type` is "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), the latter two in
        [0, 1]. Raises ValueError for a step count or labels that it cannot take.
        """
        steps = self._steps(num_inference_steps)
        labels = self._labels(class_labels, batch_size)
        told, null = self._guided(labels, guidance)
        batch = batch_size or (1 if labels is None else len(labels))
        size = self.unet.config["sample_size"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch, self.unet.config["in_channels"], height, width)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        z = x_hat = noise.float() * self.config["noise_scale"]
        steps_shown: Any = self.progress_bar(steps)  # type: ignore[operator,arg-type]
        for i, step in enumerate(steps_shown):
            weights = self.config["heads"] and self.config["heads"][str(len(steps))][i]
            x_hat = self._predict(z, step, told, weights)
            if null is not None:
                x_hat = torch.lerp(self._predict(z, step, null, weights), x_hat, guidance)  # type: ignore[arg-type]
            x_hat = x_hat.clamp(-1, 1) if clip else x_hat
            if i + 1 < len(steps):
                z = self._next(z, x_hat, [*steps, (0.0, 1.0, 0.0)][i : i + 3], generator)
        images: Any = (x_hat / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _steps(self, count: int | None) -> list[tuple[float, float, float]]:
        """(timestep, alpha, sigma) at t = 1, 1 - 1/N, ..., 1/N."""
        grid = self.config["grid"]
        count = int(self.config["num_steps"] if count is None else count)
        heads = self.config["heads"]
        if heads and str(count) not in heads:
            raise ValueError(f"num_inference_steps={count} must be one of {', '.join(heads)}, which this model knows")
        points = list(zip(grid["timesteps"], grid["alphas"], grid["sigmas"], strict=True))
        if count < 1 or len(points) % count:
            raise ValueError(f"num_inference_steps={count} must divide {len(points)}, the steps of this model's grid")
        stride = len(points) // count
        return points[stride - 1 :: stride][::-1]

    def _labels(self, labels: int | Sequence[int] | Tensor | None, batch: int | None) -> Tensor | None:
        """Labels (B,)."""
        classes = self.config["num_classes"]
        if classes is None:
            if labels is not None:
                raise ValueError("this model knows no classes: leave class_labels out")
            return None
        if labels is None:
            labels = [i % classes for i in range(batch or 1)]
        elif isinstance(labels, int):
            labels = [labels] * (batch or 1)
        given = torch.as_tensor(labels, device=self._execution_device).reshape(-1)
        if batch not in (None, len(given)):
            raise ValueError(f"{len(given)} class_labels for batch_size={batch}: give one for each image")
        if given.is_floating_point() or given.numel() == 0 or given.min() < 0 or given.max() >= classes:
            raise ValueError(f"class_labels must be integers of 0 to {classes - 1}")
        return given.long()

    def _guided(
        self, labels: Tensor | None, guidance: float | None
    ) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None] | None]:
        """What the network is given beside z and the time; and that for no class, where guidance needs it."""
        given: dict[str, Tensor | None] = {"class_labels": labels}
        taught = self.config["taught_guidance"]
        if taught is not None:
            low, high = taught
            guidance = min(max(1.0, low), high) if guidance is None else guidance
            if not low <= guidance <= high:
                raise ValueError(f"guidance={guidance} is outside of what this model was taught, {low:g} to {high:g}")
            if low < high and labels is not None:
                given["guidance"] = torch.full((len(labels),), float(guidance), device=labels.device)
            return given, None
        if guidance in (None, 1):
            return given, None
        if labels is None or self.config["null_label"] is None:
            raise ValueError(f"guidance={guidance} needs a class-conditional model trained with label dropout")
        return given, {"class_labels": torch.full_like(labels, self.config["null_label"])}

    def _next(self, z: Tensor, x_hat: Tensor, steps: list[tuple[float, float, float]], generator: Any) -> Tensor:
        """z at the second of `steps`: the one at z, the next and the one after that, or clean data."""
        stochastic = self.config["sampler"] == "stochastic"
        (_, alpha, sigma), (_, alpha_s, sigma_s) = steps[0], steps[2 if stochastic else 1]
        ratio = sigma_s / sigma
        z = ratio * z + (alpha_s - ratio * alpha) * x_hat
        if not stochastic:
            return z
        _, alpha_m, sigma_m = steps[1]
        kept = alpha_m / alpha_s
        std = (max(0.0, sigma_m - kept * sigma_s) * (sigma_m + kept * sigma_s)) ** 0.5
        return kept * z + std * randn_tensor(z.shape, generator=generator, device=z.device, dtype=z.dtype)

    def _predict(
        self,
        z: Tensor,
        step: tuple[float, float, float],
        given: dict[str, Tensor | None],
        weights: list[float] | None,
    ) -> Tensor:
        """x_hat (B, C, H, W), float32."""
        timestep, alpha, sigma = step
        edm = self.config["prediction"] == "edm"
        sd = self.config["sigma_data"]
        d = alpha**2 * sd**2 + sigma**2  # Karras et al., 2022, Table 1, for any alpha
        times = torch.full((len(z),), timestep, dtype=torch.float32, device=z.device)
        scaled = z * d**-0.5 if edm else z
        output = self.unet(scaled.to(self.unet.dtype), times, **given).sample.float()
        if weights:
            share = torch.tensor(weights, device=z.device)[:, None, None, None]
            output = (share * output.unflatten(1, (len(weights), -1))).sum(1)
        if edm:
            return alpha * sd**2 / d * z + sigma * sd * d**-0.5 * output
        return TO_X[self.config["prediction"]](output, z, alpha, sigma)
