"""What distilling a text-to-image UNet takes of a card's memory, computed on the meta device: no weights, no GPU.

    python benchmarks/memory.py --card 80

Weights, gradients, Adam's two averages, the frozen teacher and the EMA follow from the numbers of parameters: all are
float32, in `trainer.precision=bf16-mixed` too. What an image takes beside them is what autograd keeps for the way back:
each storage that a forward pass of two images saves, less those of a pass of one. In bf16-mixed, convolutions and
matrix products take halves, normalisation takes floats, and copies of the weights in halves are kept, as `fixed` says.
Attention keeps its inputs and its output alone, as fused kernels do. Passing tensors, the teacher's own pass, the
autoencoder and what the allocator wastes are not counted: batches are for nine tenths of the card.
"""

import argparse
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from pdistill import lora
from pdistill.denoiser import Denoiser
from pdistill.network import with_guidance
from pdistill.parameterization import V
from pdistill.schedule import DiscreteBetaSchedule
from pdistill.training.footprint import Evaluation, activations

SD1: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD2 = SD1 | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
MODELS = {"SD 1.5, 512 pixels": SD1, "SD 2.1, 512 pixels": SD2, "SD 2.1, 768 pixels": SD2 | {"sample_size": 96}}
TOKENS = 77
GB = 1e9
USED = 0.9  # of the card


def evaluation(network: Any) -> Evaluation:
    """Of the network, with text and guidance."""
    config = network.config

    def evaluate(images: int) -> None:
        z = torch.empty(images, config["in_channels"], config["sample_size"], config["sample_size"])
        text = torch.empty(images, TOKENS, config["cross_attention_dim"])
        guidance = torch.empty(images, config["time_cond_proj_dim"])
        network(z, torch.empty(images), encoder_hidden_states=text, timestep_cond=guidance)

    return evaluate


def student(config: dict[str, Any], rank: int | None) -> Denoiser:
    """A student on the meta device that takes guidance, whole or of adapters."""
    with torch.device("meta"):
        denoiser = Denoiser(with_guidance(UNet2DConditionModel(**config)), V(), DiscreteBetaSchedule((0.9, 0.1)))
        if rank is not None:
            lora.add(denoiser, rank)
    return lora.freeze_the_others(denoiser)


def row(name: str, rank: int | None, card: float) -> list[str]:
    """A model and a kind of student."""
    denoiser = student(MODELS[name], rank)
    sizes = [(p.numel(), p.requires_grad) for p in denoiser.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, needed in sizes if needed)
    parts = [4 * count / GB for count in (total, trained, 2 * trained, total, total)]
    cells = [name, "whole" if rank is None else f"LoRA, rank {rank}", f"{trained / 1e6:.1f} M"]
    cells += [f"{part:.2f}" for part in parts]
    for mixed in (False, True):
        once, image = (n / GB for n in activations(denoiser.network, evaluation(denoiser.network), mixed))
        fixed = sum(parts) + once
        cells += [f"{fixed:.1f}", f"{image:.2f}", str(int((USED * card - fixed) / image))]
    return cells


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=float, default=80, help="GB of memory (default: 80)")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA students (default: 64)")
    settings = parser.parse_args()
    headings = ["model", "student", "trained", "weights", "gradients", "Adam", "teacher", "EMA"]
    headings += ["float32: fixed", "an image", "batch", "bf16-mixed: fixed", "an image", "batch"]
    rows = [row(name, rank, settings.card) for name in MODELS for rank in (None, settings.rank)]
    for cells in [headings, ["---"] * 2 + ["---:"] * (len(headings) - 2), *rows]:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
