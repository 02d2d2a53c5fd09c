"""The paper's UNet, as a configured diffusers UNet2DModel."""

from collections.abc import Sequence

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from pdistill.errors import UserError


def unet(
    image_size: int,
    image_channels: int,
    out_channels: int,
    ch: int,
    emb_ch: int,
    ch_mult: Sequence[int],
    num_res_blocks: int,
    attn_resolutions: Sequence[int],
    head_dim: int | None = None,
    dropout: float = 0.0,
    num_classes: int | None = None,
) -> UNet2DModel:
    """The UNet of Salimans & Ho with their own configuration words, freshly and partly zero-initialised.

    `head_dim=None` is one attention head. The network maps (B, image_channels, S, S), S = image_size, to
    (B, out_channels, S, S). Raises UserError where the sizes do not fit together.
    """
    if image_size % 2 ** (len(ch_mult) - 1):
        raise UserError(
            f"image size {image_size} cannot be halved {len(ch_mult) - 1} times: "
            f"use network.ch_mult with fewer levels, or images of another size"
        )
    if any(ch * m % 32 for m in ch_mult):
        raise UserError(f"every level's channels must be a multiple of 32 (group norm): ch={ch}, ch_mult={ch_mult}")
    attended = [image_size // 2**level in attn_resolutions for level in range(len(ch_mult))]
    network = UNet2DModel(
        sample_size=image_size,
        in_channels=image_channels,
        out_channels=out_channels,
        block_out_channels=[ch * m for m in ch_mult],
        layers_per_block=num_res_blocks,
        down_block_types=["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attended],
        up_block_types=["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attended)],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        norm_eps=1e-6,
        attn_norm_num_groups=32,
        freq_shift=1,
        flip_sin_to_cos=False,
        time_embedding_dim=emb_ch,
        attention_head_dim=head_dim,
        dropout=dropout,
        num_class_embeds=num_classes,
    )
    zero_initialise(network)
    return network


def zero_initialise(network: UNet2DModel) -> None:
    """Every residual branch starts as the identity and the output as zero, as in the authors' code."""
    layers = [network.conv_out]
    layers += [m.conv2 for m in network.modules() if isinstance(m, ResnetBlock2D)]
    layers += [m.to_out[0] for m in network.modules() if isinstance(m, Attention)]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def set_dropout(network: nn.Module, p: float) -> None:
    """Dropout is a matter of training, not of weights: a student has its own."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
