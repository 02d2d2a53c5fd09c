"""A UNet2DModel that is told the guidance (Meng et al., 2023, 2210.03142): one evaluation a step where there were two.

This file is copied into model folders, where `trust_remote_code=True` runs it: it needs torch and diffusers alone.
"""

import functools
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn


class LabelAndGuidance(nn.Embedding):
    """The embedding of a label, with that of the guidance g added, which is zero at first.

    g goes through u = 2/pi atan(exp(-w / 2)), w = g - 1, which maps the line to (0, 1), sinusoids of 1000 u, and two
    layers, as in the authors' code.
    """

    def __init__(self, labels: int, emb_ch: int, channels: int) -> None:
        super().__init__(labels, emb_ch)
        self.features = Timesteps(channels, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.guidance: Any = TimestepEmbedding(channels, emb_ch)
        nn.init.zeros_(self.guidance.linear_2.weight)
        nn.init.zeros_(self.guidance.linear_2.bias)

    def forward(self, input: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        """(B, emb_ch) of labels (B,) and guidance (B,)."""
        label, guidance = input
        u = torch.atan(torch.exp((1 - guidance.float()) / 2)) * (2 / torch.pi)
        embedded = super().forward(label)
        return embedded + self.guidance(self.features(1000 * u).to(embedded.dtype))


class GuidedUNet2DModel(UNet2DModel):
    """UNet2DModel with one input more, `guidance` (B,), beside time and label; its configuration is that one's."""

    @functools.wraps(UNet2DModel.__init__)  # diffusers reads the configuration's keys from the signature
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        labels: Any = self.class_embedding
        channels = self.config["block_out_channels"][0]
        self.class_embedding: Any = LabelAndGuidance(labels.num_embeddings, labels.embedding_dim, channels)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        guidance: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As of UNet2DModel; both class_labels and guidance (B,) must be given."""
        if class_labels is None or guidance is None:
            raise ValueError("class_labels and guidance, (B,) each, must be given")
        return super().forward(sample, timestep, (class_labels, guidance), return_dict)  # type: ignore[arg-type]
