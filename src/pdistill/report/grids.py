"""Pictures: grids of samples, and the training images that are nearest to them."""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import save_image

from pdistill.bars import bar
from pdistill.dataset.batches import to_float, to_uint8
from pdistill.errors import UserError
from pdistill.files import whole


def save_grid(images: Tensor, path: Path, nrow: int = 8, tile: int = 48) -> None:
    """A picture of (B, C, H, W) in [-1, 1], tiles enlarged without smoothing to at least `tile` pixels."""
    save_picture(enlarged(images, tile), path, nrow=nrow, padding=2, pad_value=1.0)


def enlarged(images: Tensor, tile: int) -> Tensor:
    """(..., H, W) as whole multiples of that, without smoothing: the largest that is not wider than `tile`."""
    scale = max(1, tile // images.shape[-1])
    return images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def save_picture(images: Tensor, path: Path, **layout: float) -> None:
    """(C, H, W) or (B, C, H, W) in [-1, 1] as one picture, whole or not at all, in the format that the suffix says.

    Of images that are neither grey nor RGB the first channels are shown: three if there are so many, else one.
    `layout` goes to torchvision's `make_grid`. Raises UserError for a suffix that is no format of pictures, and where
    the images are not finite, which would be shown as black.
    """
    picture_format = Image.registered_extensions().get(path.suffix.lower())
    if picture_format is None:
        raise UserError(f"{path}: its suffix is no format of pictures: use .png, .jpg or .webp")
    if not images.isfinite().all():
        raise UserError(f"{path} is not written: its images are not finite (NaN or infinite)")
    shown = visible(images.float())
    with whole(path) as temporary:
        save_image(shown, temporary, format=picture_format, normalize=True, value_range=(-1, 1), **layout)


def visible(images: Tensor) -> Tensor:
    """(..., C, H, W) with the channels that can be shown: grey and RGB as they are, else the first three or one."""
    channels = images.shape[-3]
    return images if channels in (1, 3) else images.narrow(-3, 0, 3 if channels > 3 else 1)


def png(image: Tensor, texts: Mapping[str, str], tile: int) -> bytes:
    """(C, H, W) in [-1, 1] as a PNG file that holds the texts by their keywords (tEXt; iTXt beyond Latin-1).

    It is enlarged without smoothing to at most `tile` pixels in width.
    """
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    pixels = to_uint8(enlarged(visible(image.float().cpu()), tile)).movedim(0, -1)
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1).numpy()).save(content, "PNG", pnginfo=info)
    return content.getvalue()


@torch.inference_mode()
def nearest_neighbours(samples: Tensor, images: Tensor, k: int = 3, chunk: int = 4096) -> Tensor:
    """The `k` nearest of uint8 `images` (N, C, H, W) to samples (B, C, H, W) in [-1, 1]: (B, k, C, H, W) in [-1, 1].

    By Euclidean distance of the pixels, nearest first.
    """
    parts = images.split(chunk)
    counted = bar(parts, "nearest images", unit="part")
    distances = [torch.cdist(samples.flatten(1), to_float(part.to(samples.device)).flatten(1)) for part in counted]
    nearest = torch.cat(distances, 1).topk(min(k, len(images)), largest=False).indices.cpu()
    return torch.stack([to_float(images[index]) for index in nearest]).to(samples.device)


def name_of(denoiser: Path) -> str:
    """outputs/demo/steps-0004/denoiser -> demo-steps-0004"""
    return "-".join(denoiser.resolve().parts[-3:-1])
