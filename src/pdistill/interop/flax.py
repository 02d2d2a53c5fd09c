"""The paper authors' released checkpoints -> Denoiser.

Each is one Flax msgpack file with `ema_params`, `step`, usually `num_sample_steps`, sometimes `optimizer`. It is
decoded without JAX; the architecture follows from the shapes; every array is used once and every parameter set.

    python -m pdistill.interop.flax cifar_8 outputs/cifar_8
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import torch
from torch import Tensor

from pdistill import claims
from pdistill.checks import is_count
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError, first_line
from pdistill.network import unet
from pdistill.parameterization import X, XEps
from pdistill.reading import regular
from pdistill.schedule import CosineSchedule

NDARRAY, COMPLEX, NUMPY_SCALAR = 1, 2, 3  # Flax's msgpack extension types
DTYPES = ("float16", "float32", "float64", "int32", "int64", "uint32")
LOWEST_RESOLUTION = 8  # of every released model: 32 with three levels, 64 with four, 128 with five

PLACES = (
    (r"down_(\d+)\.block_(\d+)", lambda n, i, j: f"down_blocks.{i}.resnets.{j}"),
    (r"down_(\d+)\.attn_(\d+)", lambda n, i, j: f"down_blocks.{i}.attentions.{j}"),
    (r"down_(\d+)\.downsample", lambda n, i: f"down_blocks.{i}.downsamplers.0"),
    (r"mid\.block_(\d+)", lambda n, j: f"mid_block.resnets.{int(j) - 1}"),
    (r"mid\.attn_(\d+)", lambda n, j: f"mid_block.attentions.{int(j) - 1}"),
    (r"up_(\d+)\.block_(\d+)", lambda n, i, j: f"up_blocks.{n - 1 - int(i)}.resnets.{j}"),
    (r"up_(\d+)\.attn_(\d+)", lambda n, i, j: f"up_blocks.{n - 1 - int(i)}.attentions.{j}"),
    (r"up_(\d+)\.upsample", lambda n, i: f"up_blocks.{n - 1 - int(i)}.upsamplers.0"),
)
NAMES = {
    "dense0": "time_embedding.linear_1",
    "dense1": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "kernel": "weight",
    "scale": "weight",
}


def load_official_checkpoint(path: str | Path, image_size: int | None = None) -> Denoiser:
    """The EMA denoiser of one of the authors' files, in eval mode, with its `num_sample_steps` as num_steps.

    Shapes do not tell the image size; by default it is that of the released models, whose lowest resolution is
    8. Output channels tell x from x-and-eps. Raises UserError for a file that is missing, damaged, or of another
    architecture.
    """
    path = Path(path)
    content = _decode(path)
    try:
        arrays = dict(_flatten(content["ema_params"]))
        architecture = infer_architecture(arrays)
        levels = len(architecture["ch_mult"])
        size = image_size or LOWEST_RESOLUTION * 2 ** (levels - 1)
        attended = architecture.pop("attn_levels")
        if levels * architecture["num_res_blocks"] > claims.MOST_LAYERS or levels > claims.LISTED:
            raise ValueError(f"its arrays are of {levels} levels of {architecture['num_res_blocks']} blocks")
        with torch.device("meta"):  # whatever sizes the file claims, nothing is allocated before they are checked
            network = unet(size, attn_resolutions=[size // 2**level for level in attended], **architecture)
        network.load_state_dict(_convert(arrays, network.state_dict(), levels), assign=True)
    except Exception as error:  # of shapes and names that are no such network's
        raise UserError(
            f"{path} is not a checkpoint of the paper's UNet ({type(error).__name__}: {first_line(error)}): "
            f"expected one of the authors' files, such as cifar_8"
        ) from error
    parameterization = X() if architecture["out_channels"] == architecture["image_channels"] else XEps()
    steps = content.get("num_sample_steps")
    steps = int(steps) if isinstance(steps, int | np.integer) and is_count(int(steps)) else None
    return Denoiser(network, parameterization, CosineSchedule(), steps, [path.stem]).eval()


def infer_architecture(arrays: dict[str, np.ndarray]) -> dict:
    """The arguments of `unet` that shapes tell, and `attn_levels`: the levels that have attention.

    Raises KeyError for an array that is missing, ValueError for what `unet` cannot express.
    """
    *_, in_channels, ch = arrays["conv_in/kernel"].shape
    out_channels = arrays["conv_out/kernel"].shape[-1]
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(f"{out_channels} output channels for {in_channels} image channels are neither x nor x and eps")
    levels = len({m[1] for k in arrays if (m := re.match(r"down_(\d+)\.block_0/", k))})
    blocks = sum(bool(re.fullmatch(r"down_0\.block_\d+/conv1/kernel", k)) for k in arrays)
    queries = [a for k, a in arrays.items() if re.search(r"attn_\d+/q/kernel$", k)]
    heads = {(a.shape[1], a.shape[2]) if a.ndim == 3 else (1, a.shape[-1]) for a in queries}
    head_dims = {d for _, d in heads}
    one_head = {h for h, _ in heads} <= {1} and len(head_dims) != 1
    if not one_head and len(head_dims) > 1:
        raise ValueError(f"attention heads of several sizes, {sorted(head_dims)}")
    if levels > 1 and "down_0.downsample/conv1/kernel" not in arrays:
        raise ValueError("its resolution changes outside of residual blocks")
    return {
        "image_channels": in_channels,
        "out_channels": out_channels,
        "ch": ch,
        "emb_ch": arrays["dense1/kernel"].shape[-1],
        "ch_mult": [arrays[f"down_{i}.block_0/conv1/kernel"].shape[-1] // ch for i in range(levels)],
        "num_res_blocks": blocks,
        "attn_levels": [i for i in range(levels) if f"down_{i}.attn_0/q/kernel" in arrays],
        "head_dim": None if one_head or not head_dims or {h for h, _ in heads} == {1} else head_dims.pop(),
        "num_classes": arrays["class_emb/kernel"].shape[0] if "class_emb/kernel" in arrays else None,
    }


def _decode(path: Path) -> dict:
    """The file's tree, its arrays as views into the bytes that were read."""

    def extension(code: int, data: bytes) -> object:
        if code not in (NDARRAY, NUMPY_SCALAR):
            raise ValueError(f"holds an extension of type {code}")
        shape, dtype, content = msgpack.unpackb(data)
        dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
        if dtype not in DTYPES:
            raise ValueError(f"holds an array of type {dtype!r}")
        array = np.frombuffer(content, dtype).reshape(shape)
        if array.size == 0:
            raise ValueError("holds an empty array")
        return array if code == NDARRAY else array[()]

    try:
        regular(path)
        content = msgpack.unpackb(path.read_bytes(), ext_hook=extension, strict_map_key=False)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give one of the authors' checkpoint files"
        ) from error
    except UserError:
        raise
    except Exception as error:  # msgpack's and numpy's, of many kinds
        raise UserError(
            f"{path} is damaged or no Flax checkpoint ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("ema_params"), dict):
        raise UserError(f"{path} is no checkpoint of the authors': it has no ema_params")
    return content


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, dict) and "__msgpack_chunked_array__" in value:  # Flax splits arrays above 1 GiB
            chunks = value["chunks"]
            flat = np.concatenate([chunks[k] for k in sorted(chunks, key=int)])
            yield prefix + key, flat.reshape([value["shape"][k] for k in sorted(value["shape"], key=int)])
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, np.ndarray):
            yield prefix + key, value


def _convert(arrays: dict[str, np.ndarray], template: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The state_dict; each array is used once. Raises ValueError where names or sizes do not match."""
    arrays = dict(arrays)
    state = {}
    if "class_emb/kernel" in arrays:  # the rows see a one-hot, so the embedding is kernel + bias
        state["class_embedding.weight"] = torch.from_numpy(
            arrays.pop("class_emb/kernel") + arrays.pop("class_emb/bias")
        )
    for path, array in arrays.items():
        name = _torch_name(path, levels)
        if name not in template or name in state:
            raise ValueError(f"array {path} has no place of its own in the network")
        shape = tuple(template[name].shape)
        if array.size != template[name].numel():
            raise ValueError(f"array {path} has shape {array.shape}, expected {template[name].numel()} numbers")
        if path.endswith("/kernel"):
            out, into, *window = shape  # Flax has (*window, in, out), for attention (in, heads, d) or (heads, d, out)
            array = np.moveaxis(array.reshape(*window, into, out), (-1, -2), (0, 1))
        state[name] = torch.from_numpy(np.array(array.reshape(shape), np.float32, order="C"))
    missing = template.keys() - state.keys()
    if missing:
        raise ValueError(f"no array for {sorted(missing)[0]} and {len(missing) - 1} other parameters")
    return state


def _torch_name(path: str, levels: int) -> str:
    place, *rest = path.split("/")
    for pattern, name in PLACES:
        if match := re.fullmatch(pattern, place):
            place = name(levels, *match.groups())
            break
    return ".".join(NAMES.get(word, word) for word in (place, *rest))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pdistill.interop.flax", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("checkpoint", help="one of the authors' files, e.g. cifar_8")
    parser.add_argument("directory", help="the denoiser directory to write")
    parser.add_argument("--image-size", type=int, help="where it is not that of a released model")
    arguments = parser.parse_args()
    try:
        denoiser = load_official_checkpoint(arguments.checkpoint, arguments.image_size)
        denoiser.save(arguments.directory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    shape = "x".join(map(str, denoiser.image_shape))
    print(f"wrote {arguments.directory}: {shape}, {denoiser.parameterization.name}, {denoiser.num_steps} steps")


if __name__ == "__main__":
    main()
