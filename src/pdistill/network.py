"""The paper's UNet, as a configured diffusers UNet2DModel; what a Denoiser asks of this and of any other network."""

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from pdistill import registry, unets
from pdistill.errors import UserError
from pdistill.guided import GuidedUNet2DModel
from pdistill.randomness import seed_of
from pdistill.sampling import Condition
from pdistill.unets import UNet2DModel

CONDITIONAL_UNET = "conditional_unet"  # what a directory calls a UNet2DConditionModel; its configuration is in unet/
GUIDANCE_FEATURES = 256  # of a UNet2DConditionModel's `timestep_cond`, as in latent consistency models


def unet(
    image_size: int,
    image_channels: int,
    out_channels: int,
    ch: int = 32,
    emb_ch: int = 128,
    ch_mult: Sequence[int] = (1, 2),
    num_res_blocks: int = 1,
    attn_resolutions: Sequence[int] = (4,),
    head_dim: int | None = None,
    dropout: float = 0.0,
    num_classes: int | None = None,
) -> UNet2DModel:
    """The UNet of Salimans & Ho with their own configuration words, freshly and partly zero-initialised.

    `head_dim=None` is one attention head. The network maps (B, image_channels, S, S), S = image_size, to
    (B, out_channels, S, S). The defaults are the small network of the digits. Raises UserError where the sizes do not
    fit together.
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
        block_out_channels=tuple(ch * m for m in ch_mult),
        layers_per_block=num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attended),
        up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attended)),
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


def small_unet(
    image_size: int, image_channels: int, out_channels: int, ch: int, emb_ch: int, num_classes: int | None = None
) -> UNet2DModel:
    """A UNet for small images, halved as often as leaves 4 pixels or more; attention at the lowest resolution.

    At 8x8, with ch=32 and emb_ch=128, it is the network of conf/network/digits.yaml.
    """
    levels = [image_size]
    while levels[-1] % 2 == 0 and levels[-1] >= 8:
        levels.append(levels[-1] // 2)
    ch_mult = [1] + [2] * (len(levels) - 1)
    shape = (image_size, image_channels, out_channels)
    return unet(*shape, ch, emb_ch, ch_mult, num_res_blocks=1, attn_resolutions=levels[-1:], num_classes=num_classes)


def zero_initialise(network: UNet2DModel) -> None:
    """Every residual branch starts as the identity and the output as zero, as in the authors' code."""
    layers: list[Any] = [network.conv_out]
    layers += [m.conv2 for m in network.modules() if isinstance(m, ResnetBlock2D)]
    layers += [m.to_out[0] for m in network.modules() if isinstance(m, Attention) and m.to_out is not None]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def set_dropout(network: nn.Module, p: float) -> None:
    """Dropout is a matter of training, not of weights: a student has its own."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def call(network: nn.Module, z: Tensor, timestep: Tensor, condition: Condition = None) -> Tensor:
    """The network's output (B, C', H, W) for its input z (B, C, H, W) at timestep (B,).

    A network is called `network(z, timestep)`; labels are passed as `class_labels`, the tensors of a dict by their
    names (`label` as `class_labels`; a UNet2DConditionModel's `guidance` as `timestep_cond`). It returns a tensor, or,
    as diffusers' do, an object with `.sample`.
    """
    given = {"label": condition} if isinstance(condition, Tensor) else dict(condition or {})
    keywords = {"class_labels" if name == "label" else name: value for name, value in given.items()}
    if unets.is_conditional(network) and "guidance" in keywords:
        w = keywords.pop("guidance") - 1
        size = network.config["time_cond_proj_dim"]
        keywords["timestep_cond"] = get_timestep_embedding(1000 * w, size, downscale_freq_shift=1).to(z.dtype)
    output = network(z, timestep, **keywords)
    return output if isinstance(output, Tensor) else output.sample


def check_place_for_guidance(network: nn.Module) -> None:
    """Raises UserError for a network that `with_guidance` cannot give its input."""
    if isinstance(network, UNet2DModel):
        takes = network.config["num_class_embeds"] is not None
    else:
        named = "guidance" in inspect.signature(network.forward).parameters
        takes = named or unets.is_conditional(network)
    if not takes:
        raise UserError(
            f"a {type(network).__name__} has no input for a range of guidance: give one value, e.g. guidance=2, or a "
            f"network whose forward(z, timestep, class_labels, guidance) takes it"
        )


def with_guidance(network: nn.Module) -> nn.Module:
    """The network with one input more, `guidance` (B,), which changes nothing yet: a copy, the same each time.

    Raises UserError for a network that has no place for it.
    """
    check_place_for_guidance(network)
    if unets.is_conditional(network):
        other = _rebuilt(network, type(network), time_cond_proj_dim=GUIDANCE_FEATURES)
        nn.init.zeros_(other.get_parameter("time_embedding.cond_proj.weight"))
        return other
    return _rebuilt(network, GuidedUNet2DModel) if isinstance(network, UNet2DModel) else network


def _rebuilt(network: Any, cls: type, **changes: Any) -> nn.Module:
    """A network of `cls` with the weights of this one. What it has beyond them does not depend on what came before:
    a stage that is begun again, in another process, begins alike."""
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("guidance"))
        other = cls(**config | changes)
    other.load_state_dict(other.state_dict() | network.state_dict())
    return other.to(network.device).train(network.training)


def last_layer(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution whose output is the network's. Raises UserError where none is known to be."""
    if not isinstance(network, UNet2DModel) or any("Skip" in kind for kind in network.config["up_block_types"]):
        raise UserError(f"a {type(network).__name__} is not known to end in one convolution: use method=halving")
    return network.conv_out.weight, network.conv_out.bias  # type: ignore[return-value]


def with_last_layer(network: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A network like one that has a `last_layer`, but for its own; it shares all other weights."""
    other: Any = copy.copy(network)
    other._modules = dict(network._modules)
    before, place = other.conv_out, {"device": weight.device, "dtype": weight.dtype}
    shape = (before.in_channels, len(weight), before.kernel_size)
    other.conv_out = nn.utils.skip_init(nn.Conv2d, *shape, padding=before.padding, **place)  # draws no random numbers
    other.conv_out.load_state_dict({"weight": weight, "bias": bias})
    other.register_to_config(out_channels=len(weight))
    return other


def build(part: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    """`part(**arguments)`, leaving out those that it does not take, and remembering them for storage.

    `part` is a registered network, a `functools.partial` of one included. The project asks it with `image_size`,
    `image_channels`, `out_channels` and `num_classes`.
    """
    builder = part
    while isinstance(builder, partial):
        arguments = builder.keywords | arguments
        builder = builder.func
    taken = inspect.signature(builder).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        arguments = {name: value for name, value in arguments.items() if name in taken}
    network = builder(**arguments)
    if not isinstance(network, UNet2DModel):
        made: dict[str, Any] = {"name": registry.name_of("network", builder), "arguments": arguments}
        object.__setattr__(network, "built_with", made)
    return network


def description(network: nn.Module) -> dict[str, Any]:
    """What makes the network again: its name in the registry and the arguments. Of a UNet2DModel, its configuration.

    Raises UserError for a network that is not registered, or whose arguments nobody knows.
    """
    if isinstance(network, UNet2DModel) or unets.is_conditional(network):
        config = {k: v for k, v in network.config.items() if not k.startswith("_")}
        name = "unet" if isinstance(network, UNet2DModel) else CONDITIONAL_UNET
        return {"name": name, "arguments": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}}
    made = getattr(network, "built_with", {"name": registry.name_of("network", type(network)), "arguments": {}})
    cls = type(network).__qualname__
    if made["name"] is None:
        raise UserError(
            f"the network {cls} is not registered, and a directory could not name it: call "
            f'pdistill.register("network", "<name>", {cls}), on the command line in a module of imports=[...]'
        )
    if not hasattr(network, "built_with"):
        required = [
            name
            for name, p in inspect.signature(type(network)).parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        if required:
            raise UserError(
                f"the network {cls} was made with arguments that nobody wrote down ({', '.join(required)}): make it by "
                f"pdistill.network.build({cls}, {required[0]}=...), so that a directory can hold them"
            )
    return made


def rebuild(made: Mapping[str, Any]) -> nn.Module:
    """The network, with fresh weights, that `description` describes. Raises UserError for a name that is not known."""
    return build(registry.find("network", made["name"]), **made["arguments"])


def image_shape_of(network: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of a diffusers UNet's images or latents. Raises UserError for another network, which does not tell."""
    if not (isinstance(network, UNet2DModel) or unets.is_conditional(network)):
        raise UserError(
            f"a {type(network).__name__} does not tell the shape of its images: "
            f"give Denoiser(..., image_shape=(C, H, W))"
        )
    size = network.config["sample_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return network.config["in_channels"], height, width


def num_class_embeds(network: nn.Module) -> int | None:
    """How many labels a network embeds, the null label included; None if it takes none."""
    if isinstance(network, UNet2DModel):
        return network.config["num_class_embeds"]
    return getattr(network, "built_with", {"arguments": {}})["arguments"].get("num_classes")


def digest_of_weights(module: nn.Module, about: str) -> str:
    """16 hexadecimal digits that name a module's weights, and `about`, what they mean."""
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
