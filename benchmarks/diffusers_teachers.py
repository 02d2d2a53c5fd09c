"""Unconditional teachers by diffusers' own training recipe, small enough for one CPU thread.

`python benchmarks/diffusers_teachers.py --data <folder of JPEGs> --output <folder>` writes `teacher-linear` and
`teacher-cosine` to the folder, each a `DDPMPipeline` for `distill.py teacher=<folder>/teacher-linear`: 32x32 RGB,
epsilon prediction, 1000 timesteps. The recipe is that of diffusers' train_unconditional example (AdamW, cosine learning
rate after a warm-up, EMA with its own warm-up), the network a scaled-down UNet2DModel, the arithmetic bf16 autocast.
Started again, it goes on where it was.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor

from pdistill.bars import bar
from pdistill.dataset import image_folder
from pdistill.dataset.batches import to_float
from pdistill.files import whole, whole_directory
from pdistill.randomness import generator

BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
WARM_UP, CHECKPOINT_EVERY = 200, 200  # updates
SIZE = 32


def new_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


class Training:
    """Everything that a checkpoint must hold; what is drawn depends on (seed, update) alone."""

    def __init__(self, betas: str, updates: int, learning_rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed, self.updates, self.done = seed, updates, 0
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=betas)  # type: ignore[arg-type]
        self.network = new_network()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, fused=True
        )
        self.learning_rate = get_cosine_schedule_with_warmup(self.optimizer, WARM_UP, updates)
        self.ema = EMAModel(self.network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def step(self, images: Tensor, batch_size: int) -> float:
        """One update on `batch_size` of the uint8 images (N, C, H, W); its loss."""
        random = generator("diffusers", self.seed, self.done)
        x = to_float(images[torch.randint(len(images), (batch_size,), generator=random)])
        mirrored = torch.rand(batch_size, generator=random) < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
        noise = torch.randn(x.shape, generator=random)
        timesteps = torch.randint(self.scheduler.config["num_train_timesteps"], (batch_size,), generator=random)
        noisy: Any = self.scheduler.add_noise(x, noise, timesteps)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            output = self.network(noisy, timesteps).sample
        loss = torch.nn.functional.mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.learning_rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        self.done += 1
        return loss.item()

    def _parts(self) -> dict[str, Any]:
        return {"network": self.network, "optimizer": self.optimizer, "rate": self.learning_rate, "ema": self.ema}

    def save(self, file: Path) -> None:
        states = {name: part.state_dict() for name, part in self._parts().items()}
        with whole(file) as temporary:
            torch.save(states | {"done": self.done}, temporary)

    def load(self, file: Path) -> None:
        states = torch.load(file, weights_only=True)
        self.done = states.pop("done")
        for name, part in self._parts().items():
            part.load_state_dict(states[name])

    def pipeline(self) -> DDPMPipeline:
        """Of the averaged weights."""
        self.ema.copy_to(self.network.parameters())
        return DDPMPipeline(self.network.eval(), self.scheduler)


def train(name: str, images: Tensor, output: Path, options: argparse.Namespace) -> None:
    """The teacher `name` (of BETAS) to `output`, unless it is there."""
    if output.exists():
        print(f"{output} is there")
        return
    checkpoint = output.with_name(f"{output.name}.ckpt")
    training = Training(BETAS[name], options.updates, options.learning_rate, options.seed)
    if checkpoint.exists():
        training.load(checkpoint)
        print(f"{output} goes on after update {training.done:,}")
    losses: list[float] = []
    with bar((), output.name, options.updates, "update", initial=training.done) as progress:
        while training.done < options.updates:
            losses.append(training.step(images, options.batch_size))
            progress.update()
            if training.done % CHECKPOINT_EVERY == 0 or training.done == options.updates:
                training.save(checkpoint)
                print(f"{output.name}: update {training.done:,}, loss {sum(losses) / len(losses):.4f}", flush=True)
                losses.clear()
    with whole_directory(output) as temporary:
        training.pipeline().save_pretrained(temporary)
    checkpoint.unlink()
    print(f"wrote {output}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of images, with or without sub-folders")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the teachers")
    parser.add_argument("--teachers", nargs="+", choices=BETAS, default=list(BETAS), help="by their betas")
    parser.add_argument("--updates", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images = image_folder(options.data, SIZE).images
    for name in options.teachers:
        train(name, images, options.output / f"teacher-{name}", options)


if __name__ == "__main__":
    main()
