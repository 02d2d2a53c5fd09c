"""From an image file of whatever kind to a square of 8-bit pixels."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from pdistill.checks import whole
from pdistill.dataset.settings import choice
from pdistill.errors import UserError
from pdistill.reading import MOST_PIXELS, regular

ALPHA_MODES = {"RGBA", "LA", "PA", "RGBa", "La"}
GREY_MODES = {"1", "L", "LA", "La", "I", "F"}  # and all whose names begin with I;16
PALETTE_MODES = {"P", "PA"}
ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BY_OTHERS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}  # by Ghostscript, Windows or plugins
ROWS = 512  # of a large image that are computed on at once
MOST_AT_ONCE = 4096  # rows; the sum of larger images is made in parts
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF
WHITE_IS_ZERO = 0


def open_picture(file: Any) -> Image.Image:
    """A picture in a file, or in bytes, not yet decoded. Raises ValueError for one of more pixels than are decoded, and
    UserError for what is no regular file.

    Formats are told by content, whatever a file is called; those that another program would have to draw are refused.
    """
    Image.init()
    formats = [name for name in Image.ID if name not in BY_OTHERS]
    if isinstance(file, str | Path):
        regular(Path(file))  # to open a pipe would wait for ever
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file, formats=formats)
    _check_pixels(image)
    return image


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} are more than {MOST_PIXELS:,} pixels")


@dataclass(frozen=True)
class Transform:
    """What makes a file into pixels. Raises UserError for a value that is out of range, with its key."""

    image_size: int
    """Width and height in pixels, of the central square after resizing."""
    image_channels: int = 3
    """1 for grey, 3 for colours."""
    resize: str = "lanczos"
    """area, bilinear or lanczos; all are antialiased."""
    background: str = "white"
    """What shows through transparent pixels: a colour's name, or #rrggbb."""

    def __post_init__(self) -> None:
        whole("dataset.image_size", self.image_size, 1)
        choice("image_channels", self.image_channels, (1, 3))
        choice("resize", self.resize, tuple(RESIZERS))
        try:
            ImageColor.getrgb(self.background)
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"dataset.background={self.background} must be a colour such as white, black or '#808080'"
            ) from error

    def settings(self) -> dict:
        """The values by their keys."""
        return asdict(self)


def square_pixels(image: Image.Image, transform: Transform) -> tuple[np.ndarray, bool]:
    """uint8 (C, S, S), the central square of the first frame; and whether the file is a grey one.

    Turned upright as EXIF says; transparency is laid on the background; 16-bit grey is scaled, 65535 to 255, and float
    grey 1 to 255. Raises ValueError for an image that is too small, or whose pixels are of an unknown range.
    """
    side, size = min(image.size), transform.image_size
    if side < size:
        raise ValueError(f"{image.width}x{image.height} pixels, smaller than {size}x{size}")
    mode, full = image.mode, _range_of(image)
    _scale_transparent_level(image)
    image = _upright(image)
    _check_pixels(image)  # icons hold pictures of other sizes than they say
    if (side := min(image.size)) < size:
        raise ValueError(f"{image.width}x{image.height} pixels, smaller than {size}x{size}")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)) if image.width != image.height else image
    square.info = image.info
    if mode[0] in "IF":
        square = _grey_to_8_bits(square, full)
    square = _opaque(square, transform.background)
    grey = mode in GREY_MODES or mode.startswith("I;16") or (mode in PALETTE_MODES and _is_grey(square))
    wanted = "L" if transform.image_channels == 1 else "RGB"
    square = square if square.mode == wanted else square.convert(wanted)
    pixels = RESIZERS[transform.resize](square, size).reshape(size, size, transform.image_channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), grey


def _scale_transparent_level(image: Image.Image) -> None:
    """A PNG names its transparent colour in the file's own bits, and Pillow compares it with pixels of 8 bits."""
    clear, tile = image.info.get("transparency"), getattr(image, "tile", None)
    raw_mode = tile[0][3] if image.format == "PNG" and tile else None
    if isinstance(clear, int) and raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[raw_mode]
    elif isinstance(clear, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in clear)


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # turns a TIFF by itself
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF that is damaged says nothing; the pixels are whole all the same
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _range_of(image: Image.Image) -> tuple[float, bool] | None:
    """(what stands for white, whether it is zero that does) in a grey file of more than 8 bits; None if unknown."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))
    inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    if image.mode == "F":
        return 1, inverted
    if image.mode.startswith("I;16"):
        return 2 ** int(bits[0] if isinstance(bits, tuple) else bits) - 1, inverted
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535, False  # they have no more than 16 bits, and Pillow scales PPM's smaller ranges
    return None


def _grey_to_8_bits(image: Image.Image, full: tuple[float, bool] | None) -> Image.Image:
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not finite")
    least, largest = float(values.min()), float(values.max())
    white, inverted = full or (65535, False)
    if least < 0 or largest > white or (full is None and 0 < largest <= 255):
        raise ValueError(
            f"{'float' if image.mode == 'F' else 'integer'} pixels from {least:g} to {largest:g}, whose range is not "
            f"known ({'0 to 1' if image.mode == 'F' else f'0 to {white:g}'} is): convert it to 8 bits"
        )
    pixels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), ROWS):  # in float64 all of them together take a lot of memory
        rows = values[start : start + ROWS].astype(np.float64)
        pixels[start : start + ROWS] = np.rint((white - rows if inverted else rows) * (255 / white))
    if isinstance(clear := image.info.get("transparency"), int):
        return Image.fromarray(np.stack([pixels, np.where(values == clear, 0, 255).astype(np.uint8)], -1))
    return Image.fromarray(pixels)


def _opaque(image: Image.Image, background: str) -> Image.Image:
    """The image without transparency, in a mode that converts to L and RGB."""
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    if image.mode not in ALPHA_MODES and "transparency" not in image.info:
        return image
    image = image.convert("LA") if image.mode == "La" else image
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGB", image.size, ImageColor.getrgb(background)[:3])
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _is_grey(image: Image.Image) -> bool:
    pixels = np.asarray(image.convert("RGB"))
    return bool((pixels == pixels[..., :1]).all())


@functools.lru_cache(256)
def _overlaps(side: int, size: int) -> np.ndarray:
    """(size, side): how much of target pixel i is covered by source pixel j; rows add up to one."""
    edges = np.linspace(0, side, size + 1)
    pixels = np.arange(side)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (covered.clip(0) * (size / side)).astype(np.float32)


def _area(square: Image.Image, size: int) -> np.ndarray:
    """The mean over the area that each target pixel covers, with fractional pixels at its edges."""
    weights = _overlaps(square.width, size)
    pixels = np.asarray(square).reshape(square.width, square.width, -1)  # (side, side, C)
    if square.width <= MOST_AT_ONCE:
        columns = np.tensordot(weights, pixels.astype(np.float32), (1, 0))  # (size, side, C)
    else:
        starts = range(0, square.width, ROWS)
        parts = ((weights[:, k : k + ROWS], pixels[k : k + ROWS].astype(np.float32)) for k in starts)
        columns = functools.reduce(np.add, (np.tensordot(weight, rows, (1, 0)) for weight, rows in parts))
    return np.rint(np.tensordot(weights, columns, (1, 1)).swapaxes(0, 1)).astype(np.uint8)


def _pil(filter: Image.Resampling) -> Callable[[Image.Image, int], np.ndarray]:
    return lambda square, size: np.asarray(square.resize((size, size), filter))


RESIZERS = {"area": _area, "bilinear": _pil(Image.Resampling.BILINEAR), "lanczos": _pil(Image.Resampling.LANCZOS)}
