"""Pictures of a run for its page: the grids of its stages, and strips of their first samples."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pdistill.errors import UserError, first_line
from pdistill.reading import regular

COLUMNS = 8  # samples in a strip
PER_LINE = 8  # of the 64 pictures of samples.png, with a border of two pixels
BORDER = 2
MOST_PICTURE = 64 * 1024**2  # bytes of one on the page
MOST_STRIPS = 8


def strip(grid: Path, columns: int = COLUMNS) -> Image.Image:
    """The first samples of a grid side by side, nothing between them. Raises UserError for a grid that is damaged."""
    try:
        regular(grid)
        with Image.open(grid, formats=["PNG"]) as picture:
            width, height = ((side - BORDER) // PER_LINE for side in picture.size)
            found = Image.new("RGBA", (width * columns - BORDER, height - BORDER))
            for k in range(columns):
                left, top = (k % PER_LINE) * width + BORDER, (k // PER_LINE) * height + BORDER
                tile = picture.crop((left, top, left + width - BORDER, top + height - BORDER))
                found.paste(tile.convert("RGB"), (k * width, 0))
        return found
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{grid} is damaged ({first_line(error)}): delete it and its stage's metrics.json") from error


def embedded(picture: Path | Image.Image) -> str:
    """A picture as the page holds it, in base64. Raises UserError for a file that is too large."""
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        return base64.b64encode(buffer.getvalue()).decode()
    if regular(picture) > MOST_PICTURE:
        raise UserError(f"{picture} has more than {MOST_PICTURE:,} bytes, too many for a page: delete it")
    return base64.b64encode(picture.read_bytes()).decode()


def some(items: Sequence, most: int = MOST_STRIPS) -> list:
    """All of them, or so many at equal distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]
