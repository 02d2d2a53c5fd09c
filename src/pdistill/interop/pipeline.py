"""A few-step sampler: clipped DDIM on the grid of times that the network was distilled for.

This file travels inside the folders of models, for those whose output, noise process or labels no pipeline of diffusers
knows, and for whoever leaves the step count out. It needs torch and diffusers alone:

    options = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    DiffusionPipeline.from_pretrained(folder, **options)(batch_size=4).images

z_t = alpha_t x + sigma_t eps. Step counts must divide the grid's; left out, it is the one that the model was made for.
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class FewStepPipeline(DiffusionPipeline):
    """Of the grid t = 1/N, ..., 1 `timesteps` are what the network sees of time, `alphas` and `sigmas` the process.

    `prediction` says what the network gives: x, eps, v, flow (eps - x), x_eps (both) or edm (with `sigma_data`).
    Without a grid, it is the scheduler's, whose indices the network then takes.
    """

    _optional_components = ["scheduler"]

    def __init__(
        self,
        unet,
        scheduler=None,
        prediction=None,
        sigma_data=1.0,
        timesteps=None,
        alphas=None,
        sigmas=None,
        noise_scale=1.0,
        num_steps=None,
        num_classes=None,
        null_label=None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        if timesteps is None:
            size = scheduler.config.num_train_timesteps
            if hasattr(scheduler, "alphas_cumprod"):
                prediction = {"v_prediction": "v", "sample": "x", "epsilon": "eps"}[scheduler.config.prediction_type]
                timesteps = list(range(size))
                alphas = scheduler.alphas_cumprod.double().sqrt().tolist()
                sigmas = (1 - scheduler.alphas_cumprod.double()).sqrt().tolist()
            else:  # flow matching
                prediction, timesteps = "flow", list(range(1, size + 1))
                sigmas = [i / size for i in timesteps]
                alphas = [1 - sigma for sigma in sigmas]
        self.register_to_config(
            prediction=prediction,
            sigma_data=sigma_data,
            timesteps=list(timesteps),
            alphas=list(alphas),
            sigmas=list(sigmas),
            noise_scale=noise_scale,
            num_steps=num_steps or len(timesteps),
            num_classes=num_classes,
            null_label=null_label,
        )

    def x_hat(self, z, i, label, clip):
        """The network's idea of the image at t = i / len(grid)."""
        config = self.config
        alpha, sigma, name = config.alphas[i - 1], config.sigmas[i - 1], config.prediction
        d = (alpha * config.sigma_data) ** 2 + sigma**2
        scaled = z / d**0.5 if name == "edm" else z
        kind = torch.long if self.unet.config.time_embedding_type == "learned" else torch.float32
        timestep = torch.full((len(z),), config.timesteps[i - 1], device=z.device, dtype=kind)
        output = self.unet(scaled.to(self.unet.dtype), timestep, class_labels=label).sample.to(z.dtype)
        total = alpha**2 + sigma**2
        if name == "x":
            x = output
        elif name == "eps":
            x = (z - sigma * output) / alpha
        elif name == "v":
            x = (alpha * z - sigma * output) / total
        elif name == "flow":
            x = (z - sigma * output) / (alpha + sigma)
        elif name == "x_eps":
            of_x, of_eps = output.chunk(2, dim=1)
            x = (sigma**2 * of_x + alpha * (z - sigma * of_eps)) / total
        elif name == "edm":
            x = alpha * config.sigma_data**2 / d * z + sigma * config.sigma_data / d**0.5 * output
        else:
            raise ValueError(f"prediction must be x, eps, v, flow, x_eps or edm, not {name!r}")
        return x.clamp(-1, 1) if clip else x

    @torch.no_grad()
    def __call__(
        self,
        batch_size=1,
        generator=None,
        num_inference_steps=None,
        class_labels=None,
        *,
        guidance=1.0,
        clip=True,
        noise=None,
        output_type="pil",
        return_dict=True,
    ):
        """Images from unit `noise` (B, C, H, W), which `generator` draws if it is not given.

        `class_labels` are one label or `batch_size` of them; left out, all classes take turns. `guidance` other than 1
        needs a model with a null label.
        """
        config, network = self.config, self.unet.config
        size, steps = len(config.timesteps), num_inference_steps or config.num_steps
        if steps < 1 or size % steps:
            raise ValueError(f"num_inference_steps={steps} must divide {size}, the grid of this model")
        sides = network.sample_size
        height, width = sides if isinstance(sides, (list, tuple)) else (sides, sides)
        if noise is None:
            shape = (batch_size, network.in_channels, height, width)
            noise = randn_tensor(shape, generator=generator, device=self._execution_device)
        z, label, null = noise.to(self._execution_device, torch.float32) * config.noise_scale, None, None
        if config.num_classes is not None:
            given = range(config.num_classes) if class_labels is None else class_labels
            given = [given] if isinstance(given, int) else [int(k) for k in given]
            if not all(0 <= k < config.num_classes for k in given):
                raise ValueError(f"class_labels must be from 0 to {config.num_classes - 1}, not {given}")
            label = torch.tensor([given[i % len(given)] for i in range(len(z))], device=z.device)
        elif class_labels is not None:
            raise ValueError("class_labels: this model knows no classes")
        if guidance != 1:
            if label is None or config.null_label is None:
                raise ValueError(f"guidance={guidance} needs a model with a null label")
            null = torch.full_like(label, config.null_label)
        stride = size // steps
        x = z
        for i in self.progress_bar(range(size, 0, -stride)):
            x = self.x_hat(z, i, label, clip and null is None)
            if null is not None:
                x = torch.lerp(self.x_hat(z, i, null, False), x, guidance)
                x = x.clamp(-1, 1) if clip else x
            if i > stride:
                ratio = config.sigmas[i - stride - 1] / config.sigmas[i - 1]
                z = ratio * z + (config.alphas[i - stride - 1] - ratio * config.alphas[i - 1]) * x
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
